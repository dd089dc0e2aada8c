"""How a question becomes a prompt: the checkpoint's chat template, or a conversation the authors evaluate with."""

from __future__ import annotations

_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
#: The authors' conversations (llava/conversation.py) and the sentence that each opens with; they differ in one word.
#: All evaluation scripts of LLaVA-1.5 and SparseVLM take `vicuna_v1`, those of Video-LLaVA `llava_v1`.
CONVERSATIONS = {"vicuna_v1": _SYSTEM.format("user"), "llava_v1": _SYSTEM.format("human")}
PROMPTS = ("hub", *CONVERSATIONS)

#: A turn: {"role": "user" or "assistant", "content": text}.
Message = dict[str, str]


def as_conversation(text: str | list[Message]) -> list[Message]:
    """A question as a conversation of one turn; a conversation is checked and returned.

    Raises:
        ValueError: not text or a list of turns that ends with the user's.
    """
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ("user", "assistant") and isinstance(m.get("content"), str)
        for m in messages
    )
    if not well_formed or not messages or messages[-1]["role"] != "user":
        raise ValueError(
            "a question is a string or a list of {'role': 'user' or 'assistant', 'content': str} that ends with the "
            f"user's turn; got {text!r:.200}"
        )
    return messages


def render_hub(messages: list[Message], media: list[str], tokenizer, template: str) -> str:
    """The checkpoint's chat template. `media` ("image", "video") go into the first turn, before its text."""
    turns = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    turns[0]["content"] = [*({"type": kind} for kind in media), *turns[0]["content"]]
    return tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)


def render_conversation(name: str, messages: list[Message], media: list[str]) -> str:
    """One of CONVERSATIONS: its sentence, ``USER: <image>\\n{question} ASSISTANT:``; answers end with `</s>`."""
    prompt = CONVERSATIONS[name] + " "
    placeholders = "".join(f"<{kind}>\n" for kind in media)
    for i, message in enumerate(messages):
        content = placeholders + message["content"] if i == 0 else message["content"]
        prompt += f"USER: {content} " if message["role"] == "user" else f"ASSISTANT: {content}</s>"
    return prompt + "ASSISTANT:"
