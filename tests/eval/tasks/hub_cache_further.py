"""The part of the made-up hub cache that the benchmarks beside the paper's need; see hub_cache.py."""

from __future__ import annotations

from pathlib import Path

from datasets import Sequence

from tests.eval.tasks.hub_cache import IMAGE, NUMBER, TEXT, picture, write_dataset

_ORG = "lmms-lab-encoder"


def build(home: Path) -> None:
    answers = ["red"] * 7 + ["blue"] * 3
    rows = [
        dict(question_id=f"VizWiz_{i}", image=picture(i), question="What Colour is this?", category="other")
        for i in range(2)
    ]
    schema = dict(question_id=TEXT, image=IMAGE, question=TEXT, category=TEXT, answers=Sequence(TEXT))
    splits = {"val": [{**row, "answers": answers} for row in rows], "test": [{**row, "answers": None} for row in rows]}
    write_dataset(home, f"{_ORG}/VizWiz-VQA", None, splits, schema)

    names = ("question_id", "question", "caption", "gpt_answer", "category", "image_id")
    rows = [
        dict(zip(names, (str(i), f"What is {kind}?", "A cat. It sleeps.", f"A {kind} cat.", kind, f"{i}"), strict=True))
        for i, kind in enumerate(("conv", "detail", "complex"))
    ]
    rows = [{**row, "image": picture(0)} for row in rows]
    write_dataset(
        home, f"{_ORG}/llava-bench-in-the-wild", None, {"train": rows}, {**dict.fromkeys(names, TEXT), "image": IMAGE}
    )

    texts = ("question", "hint", "answer", "A", "B", "C", "D", "category", "source", "L2-category", "comment", "split")
    rows = [
        {**dict.fromkeys(texts, "nan"), "index": 7 + turn * 1_000_000, "question": "这是什么？", "hint": "一张照片。",
         "answer": "AB"[turn], "A": "猫狗"[turn], "B": "狗猫"[turn], "image": picture(1)}
        for turn in (0, 1)
    ]  # fmt: skip
    schema = {**dict.fromkeys(texts, TEXT), "index": NUMBER, "image": IMAGE}
    write_dataset(home, f"{_ORG}/MMBench", "cn", {"dev": rows}, schema)

    rows = [
        dict(image=shown, question="Which is a mammal?", choices=["cat", "rock"], answer=i, hint="")
        for i, shown in enumerate((picture(0), None))
    ]
    schema = dict(image=IMAGE, question=TEXT, choices=Sequence(TEXT), answer=NUMBER, hint=TEXT)
    write_dataset(home, f"{_ORG}/ScienceQA", "ScienceQA-FULL", {"test": rows}, schema)

    rows = [
        dict(type=f"{kind}_test", question="How many?", answer=answer, image=picture(0))
        for kind, answer in (("human", "20"), ("augmented", "Norway"))
    ]
    write_dataset(
        home, f"{_ORG}/ChartQA", None, {"test": rows}, dict(type=TEXT, question=TEXT, answer=TEXT, image=IMAGE)
    )

    rows = [
        dict(dataset=data, question="what is written?", question_type=kind, answer=[word], image=picture(0))
        for data, kind, word in (
            ("IIIT5K", "Regular Text Recognition", "Hello"),
            ("HME100k", "Handwritten Mathematical Expression Recognition", "x ^ 2"),
        )
    ]
    schema = dict(dataset=TEXT, question=TEXT, question_type=TEXT, answer=Sequence(TEXT), image=IMAGE)
    write_dataset(home, "echo840/OCRBench", None, {"test": rows}, schema)

    rows = [
        dict(question="Which eats grass?", options=["cow", "lion"], answer=str(i), image=picture(i)) for i in range(2)
    ]
    schema = dict(question=TEXT, options=Sequence(TEXT), answer=TEXT, image=IMAGE)
    write_dataset(home, f"{_ORG}/ai2d", None, {"test": rows}, schema)

    kinds = (("coarse perception", "image emotion", "A"), ("math", "geometry", "B"), ("math", "geometry", "C"))
    rows = [
        dict(
            index=i,
            question="Which? Options: A: x, B: y, C: z",
            answer=answer,
            category=c,
            l2_category=kind,
            image=picture(i),
        )
        for i, (c, kind, answer) in enumerate(kinds)
    ]
    schema = dict(index=NUMBER, question=TEXT, answer=TEXT, category=TEXT, l2_category=TEXT, image=IMAGE)
    write_dataset(home, "Lin-Chen/MMStar", None, {"val": rows}, schema)

    rows = [dict(questionId="1", question="What date?", answers=["3 May", "May 3"], image=picture(0))]
    schema = dict(questionId=TEXT, question=TEXT, answers=Sequence(TEXT), image=IMAGE)
    write_dataset(home, f"{_ORG}/DocVQA", "DocVQA", {"validation": rows}, schema)
