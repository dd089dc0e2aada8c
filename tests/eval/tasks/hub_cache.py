# ruff: noqa: E501
"""A hub cache with the benchmarks' exact schemas and a handful of made-up rows each, for lmms-eval's true task code.

    python -m tests.eval.tasks.hub_cache <folder>
    HF_HOME=<folder> HF_HUB_OFFLINE=1 python -m eval.run task=gqa

Offline, `datasets` falls back to what it finds prepared in
`<HF_HOME>/datasets/<org>___<name>/<config>/0.0.0/<hash>/{dataset_info.json, <name>-<split>.arrow}`. Videos are files
below HF_HOME, where the tasks look for them. Everything is made in a few seconds; nothing is real data.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import av
import numpy as np
from datasets import DatasetInfo, Features, Image, Sequence, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase
from PIL import Image as Picture

from eval.tasks.benchmarks import MVBENCH
from eval.tasks.video_qa.data import FOLDERS

TEXT, NUMBER, YES_NO, IMAGE = Value("string"), Value("int64"), Value("bool"), Image()
FRAMES, WIDTH, HEIGHT = 24, 64, 48
_ORG = "lmms-lab-encoder"


def picture(seed: int) -> Picture.Image:
    return Picture.fromarray(np.random.RandomState(seed).randint(0, 255, (60, 80, 3), dtype=np.uint8))


def write_dataset(
    home: Path, repository: str, config: str | None, splits: dict[str, list[dict]], features: dict
) -> None:
    """One configuration of a dataset, as if it had been downloaded and prepared."""
    organisation, name = repository.split("/")
    name, config, features = camelcase_to_snakecase(name), config or "default", Features(features)
    digest = hashlib.sha1(config.encode()).hexdigest()
    folder = home / "datasets" / f"{organisation}___{name}" / config / "0.0.0" / digest
    folder.mkdir(parents=True)
    found = SplitDict(dataset_name=name)
    for split, rows in splits.items():
        with ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features) as writer:
            for row in rows:
                writer.write(features.encode_example(row))
            count, size = writer.finalize()
        found.add(SplitInfo(name=split, num_bytes=size, num_examples=count, dataset_name=name))
    info = DatasetInfo(
        features=features, builder_name="parquet", dataset_name=name, config_name=config, version="0.0.0", splits=found
    )
    info.write_to_directory(str(folder))
    newest = 2_000_000_000 if config == "default" else 1_000_000_000  # the one taken when none is named
    os.utime(folder, (newest, newest))


def write_video(path: Path, seed: int = 0, frames: int = FRAMES, codec: str = "libx264", **options) -> Path:
    """A picture that moves to the right; `options` are the container's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = np.random.RandomState(seed).randint(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 2 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return path


def build(home: Path) -> Path:
    """Write everything below `home`, to be used as HF_HOME."""
    home = Path(home)
    from tests.eval.tasks import hub_cache_further

    hub_cache_further.build(home)
    _pictures(home)
    _multiple_choice(home)
    _videos(home)
    return home


def _pictures(home: Path) -> None:
    instructions = [
        dict(
            id=f"q{i}",
            imageId=f"n{i % 2}",
            question="Is the sky blue?",
            answer="yes",
            fullAnswer="Yes, it is.",
            isBalanced=True,
        )
        for i in range(4)
    ]
    schema = dict(id=TEXT, imageId=TEXT, question=TEXT, answer=TEXT, fullAnswer=TEXT, isBalanced=YES_NO)
    write_dataset(home, f"{_ORG}/GQA", "testdev_balanced_instructions", {"testdev": instructions}, schema)
    pictures = [dict(id=f"n{i}", image=picture(i)) for i in range(2)]
    write_dataset(home, f"{_ORG}/GQA", "testdev_balanced_images", {"testdev": pictures}, dict(id=TEXT, image=IMAGE))

    rows = [
        dict(
            question_id=f"{c}/{k}.png",
            image=picture(k),
            question="Is it so? Please answer yes or no.",
            answer=a,
            category=c,
        )
        for c in ("existence", "code_reasoning")
        for a in ("Yes", "No")  # the two questions of a picture are not neighbours
        for k in range(2)
    ]
    write_dataset(
        home,
        f"{_ORG}/MME",
        None,
        {"test": rows},
        dict(question_id=TEXT, image=IMAGE, question=TEXT, answer=TEXT, category=TEXT),
    )

    rows = [
        dict(
            id=str(n),
            question_id=str(i),
            question="Is there a dog?",
            answer=("no", "yes")[i % 2],
            image_source="x",
            image=picture(i),
            category=c,
        )
        for n, (c, i) in enumerate((c, i) for c in ("adversarial", "popular", "random") for i in range(4))
    ]
    schema = dict(id=TEXT, question_id=TEXT, question=TEXT, answer=TEXT, image_source=TEXT, image=IMAGE, category=TEXT)
    write_dataset(home, f"{_ORG}/POPE", None, {"test": rows}, schema)
    splits = {c: [r for r in rows if r["category"] == c] for c in ("adversarial", "popular", "random")}
    write_dataset(home, f"{_ORG}/POPE", "Full", splits, schema)

    schema = dict(
        image_id=TEXT, question_id=NUMBER, question=TEXT, image=IMAGE, answers=Sequence(TEXT), image_classes=Sequence(TEXT),
        set_name=TEXT, ocr_tokens=Sequence(TEXT),
    )  # fmt: skip
    rows = [
        dict(
            image_id=f"i{i}",
            question_id=i,
            question="what brand is this?",
            image=picture(i),
            answers=["nokia"] * 7 + ["sony"] * 3,
            image_classes=["phone"],
            set_name="val",
            ocr_tokens=["NOKIA", "3310"],
        )
        for i in range(3)
    ]
    write_dataset(home, f"{_ORG}/textvqa", None, {"validation": rows}, schema)

    schema = dict(
        question_type=TEXT, multiple_choice_answer=TEXT, answers=[{"answer": TEXT, "answer_confidence": TEXT, "answer_id": NUMBER}],
        image_id=NUMBER, answer_type=TEXT, question_id=NUMBER, question=TEXT, image=IMAGE,
    )  # fmt: skip
    rows = [
        dict(
            question_type="what",
            multiple_choice_answer="cat",
            answers=[dict(answer="cat" if j < 6 else "dog", answer_confidence="yes", answer_id=j) for j in range(10)],
            image_id=i,
            answer_type="other",
            question_id=i,
            question="What animal is this?",
            image=picture(i),
        )
        for i in range(3)
    ]
    test = [
        {**row, "answers": None, "multiple_choice_answer": None, "question_id": 20 + i} for i, row in enumerate(rows)
    ]
    write_dataset(home, f"{_ORG}/VQAv2", None, {"validation": rows, "testdev": test}, schema)

    rows = [
        dict(
            question_id=f"v1_{i}",
            image=picture(i),
            question="What is x?",
            answer=a,
            image_source="x",
            capability="ocr,math",
        )
        for i, a in enumerate(("-1<AND>-5", "red<OR>crimson"))
    ]
    schema = dict(question_id=TEXT, image=IMAGE, question=TEXT, answer=TEXT, image_source=TEXT, capability=TEXT)
    write_dataset(home, f"{_ORG}/MMVet", None, {"test": rows}, schema)

    rows = [
        dict(image_id=f"c{i}", question_field=q, question=f"{q}?", answer=a, image=picture(i))
        for i in range(2)
        for q, a in (("N/Y", "Yes"), ("Choices", "A"), ("Q/A", "red car"))
    ]
    schema = dict(image_id=TEXT, question_field=TEXT, question=TEXT, answer=TEXT, image=IMAGE)
    write_dataset(home, "ConBench/ConBench_D", None, {"test": rows}, schema)


def _multiple_choice(home: Path) -> None:
    schema = dict(
        image=IMAGE, question=TEXT, choices=Sequence(TEXT), answer=NUMBER, hint=TEXT, task=TEXT, grade=TEXT, subject=TEXT,
        topic=TEXT, category=TEXT, skill=TEXT, lecture=TEXT, solution=TEXT,
    )  # fmt: skip
    rest = dict(
        task="closed choice",
        grade="grade3",
        subject="natural science",
        topic="biology",
        category="animals",
        skill="identify",
        lecture="",
        solution="",
    )
    rows = [
        dict(
            image=picture(i),
            question="Which is a mammal?",
            choices=["cat", "rock", "fern"][: 2 + i % 2],
            answer=i % 2,
            hint="" if i else "Look at the picture.",
            **rest,
        )
        for i in range(3)
    ]
    write_dataset(home, f"{_ORG}/ScienceQA", "ScienceQA-IMG", {"test": rows}, schema)

    schema = {
        "index": NUMBER, "question": TEXT, "hint": TEXT, "answer": TEXT, "A": TEXT, "B": TEXT, "C": TEXT, "D": TEXT,
        "category": TEXT, "image": IMAGE, "source": TEXT, "L2-category": TEXT, "comment": TEXT, "split": TEXT,
    }  # fmt: skip
    rows = [
        dict(
            index=i + c * 1_000_000,
            question="What is it?",
            hint=("nan", "A zoo.")[i - 1],
            answer="AB"[c],
            A=("cat", "dog")[c],
            B=("dog", "cat")[c],
            C="nan",
            D="nan",
            category="object_localization",
            image=picture(i),
            source="x",
            **{"L2-category": "finegrained_perception"},
            comment="nan",
            split="dev",
        )
        for c in (0, 1)
        for i in (1, 2)
    ]
    write_dataset(home, f"{_ORG}/MMBench", "en", {"dev": rows}, schema)

    schema = dict(
        answer=TEXT, choice_a=TEXT, choice_b=TEXT, choice_c=TEXT, choice_d=TEXT, data_id=TEXT, data_type=TEXT, question=TEXT,
        question_id=TEXT, question_type_id=NUMBER, image=Sequence(IMAGE), segment=Sequence(NUMBER),
    )  # fmt: skip
    choices = dict(choice_a="one", choice_b="two", choice_c="three", choice_d="four")
    film = dict(
        answer="B",
        **choices,
        data_id="v0",
        data_type="video",
        question="What happens?",
        question_id="9",
        question_type_id=10,
        image=[picture(1), picture(2), picture(3)],
        segment=[0],
    )
    rows = [film] + [
        dict(
            answer="A",
            **choices,
            data_id=f"d{i}",
            data_type="image",
            question="How many?",
            question_id=str(i),
            question_type_id=5,
            image=[picture(i)],
            segment=[],
        )
        for i in range(3)
    ]
    write_dataset(home, f"{_ORG}/SEED-Bench", None, {"test": rows}, schema)


def _videos(home: Path) -> None:
    rows = [
        dict(video_name=f"a{i}", question="is the person running", question_id=f"q{i}", answer="yes", type="3")
        for i in range(2)
    ]
    schema = dict(video_name=TEXT, question=TEXT, question_id=TEXT, answer=TEXT, type=TEXT)
    write_dataset(home, "lmms-eval/ActivityNetQA", None, {"test": rows}, schema)

    schema = dict(
        video_id=TEXT, duration=TEXT, domain=TEXT, sub_category=TEXT, url=TEXT, videoID=TEXT, question_id=TEXT, task_type=TEXT,
        question=TEXT, options=Sequence(TEXT), answer=TEXT,
    )  # fmt: skip
    rows = [
        dict(
            video_id=f"{i:03d}",
            duration=d,
            domain="Knowledge",
            sub_category="Astronomy",
            url="u",
            videoID=f"vm{i}",
            question_id=f"{i}-1",
            task_type="Counting Problem",
            question="How many stars?",
            options=["A. 1", "B. 2", "C. 3", "D. 4"],
            answer="B",
        )
        for i, d in enumerate(("short", "medium", "long"))
    ]
    write_dataset(home, "lmms-eval/Video-MME", None, {"test": rows}, schema)

    schema = dict(
        video=NUMBER, frame_count=NUMBER, width=NUMBER, height=NUMBER, question=TEXT, answer=NUMBER, qid=NUMBER, type=TEXT,
        a0=TEXT, a1=TEXT, a2=TEXT, a3=TEXT, a4=TEXT,
    )  # fmt: skip
    rows = [
        dict(
            video=100 + i,
            frame_count=FRAMES,
            width=WIDTH,
            height=HEIGHT,
            question="why did the man run",
            answer=i,
            qid=i,
            type="CW",
            a0="late",
            a1="fun",
            a2="sport",
            a3="fear",
            a4="bus",
        )
        for i in range(2)
    ]
    write_dataset(home, "lmms-eval/NExTQA", "MC", {"test": rows}, schema)

    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    schema = dict(video=TEXT, question=TEXT, candidates=Sequence(TEXT), answer=TEXT)
    for sub in MVBENCH:
        rows = [
            dict(video=f"mv{i}.mp4", question="What happens?", candidates=["up", "down", "left"], answer="down")
            for i in range(2)
        ]
        write_dataset(home, "OpenGVLab/MVBench", sub, {"train": rows}, schema)

    film = [write_video(home / "activitynetqa" / "all_test" / f"v_a{i}.mp4", i).read_bytes() for i in range(3)]
    folders = {home / "videomme" / "data": "vm{}.mp4", home / "nextqa" / "NExTVideo": "10{}.mp4"}
    folders |= {home / "mvbench_video" / folder: "mv{}.mp4" for folder in DATA_LIST.values()}
    for folder, name in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(3):
            (folder / name.format(i)).write_bytes(film[i])

    kinds = {"tgif": (".gif", "gif"), "msvd": (".avi", "mpeg4"), "msrvtt": (".mp4", "libx264")}
    for task, (suffix, codec) in kinds.items():
        folder = home / "GPT_Zero_Shot_QA" / FOLDERS[task]
        for i in range(2):
            write_video(folder / "videos" / f"clip{i}{suffix}", i, codec=codec)
        questions = [
            dict(video_name=f"clip{i}", question_id=f"{task}{i}", question="what is moving?") for i in range(2)
        ]
        answers = [dict(question_id=f"{task}{i}", answer=a, type=1) for i, a in ((1, "a red dot"), (0, "dot"))]
        (folder / "test_q.json").write_text(json.dumps(questions))
        (folder / "test_a.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
