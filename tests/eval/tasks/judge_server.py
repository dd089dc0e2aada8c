"""A stand-in for a language model that judges: an OpenAI-compatible endpoint on this machine that compares strings."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = "stand-in-2026-11-21"


def verdict(messages: list[dict]) -> str:
    text = "\n".join(m["content"] for m in messages)
    if "video-based question-answer pair" in text:
        right, said = re.search(r"Correct Answer: (.*)\nPredicted Answer: (.*)\n", text).groups()
        same = right.strip().lower() == said.strip().lower()
        return f"Here it is: {{'pred': '{'yes' if same else 'no'}', 'score': {4.8 if same else 0}}}"
    if "[End of Assistant 2]" in text:
        first, second = (re.search(rf"\[Assistant {i}\]\n(.*?)\n\n\[End of", text, re.DOTALL)[1] for i in (1, 2))
        return f"8 {8 if first == second else 0}\nBecause."
    if "Question | Ground truth" in text:
        _, right, said, _ = (part.strip() for part in text.splitlines()[-1].split("|"))
        any_of = [[p.strip() for p in option.split("<AND>")] for option in right.split("<OR>")]
        return "1.0" if any(all(p in said for p in parts) and said for parts in any_of) else "0.0"
    return "yes"


class Endpoint:
    """Attributes:
    url: for task.judge_url.
    requests: bodies that came.
    reply: messages -> text; None = never answer.
    status: of HTTP.
    """

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.reply, self.status = verdict, 200
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
                if endpoint.reply is None:
                    time.sleep(30)
                    return
                message = {"role": "assistant", "content": endpoint.reply(body["messages"])}
                choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                content = {"id": "x", "object": "chat.completion", "created": 0, "model": VERSION, "choices": choices}
                payload = json.dumps({**content, "usage": usage}).encode()
                self.send_response(endpoint.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    """The endpoint, answering until the end of the block."""
    served = Endpoint()
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.server.shutdown()
        served.server.server_close()
