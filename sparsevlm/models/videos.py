"""Frames of video files, frame-exact, from files as they are found: few frames of long ones without decoding all.

Read by PyAV, which is imported only here. A file that breaks off is an error: frames of its first half would pass for
a whole video.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

#: How names of video files end.
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
#: Share of the frames a container announces that must be there; the last ones are often missing from sound files.
COMPLETE = 0.97
#: Above this number of frames the decoder jumps to the key frame before each wanted one.
SEEK_ABOVE = 1500


def uniform(count: int, frames: int) -> np.ndarray:
    """Indices of `frames` evenly spaced frames of `count`, first and last included; of a shorter video some several
    times. As Video-LLaVA takes them (processing_video.py:load_and_transform_video)."""
    return np.linspace(0, count - 1, frames, dtype=int)


def read_frames(path: str | Path, frames: int) -> np.ndarray:
    """`frames` evenly spaced frames of a video file.

    Args:
        path: any container that FFmpeg reads (mp4, avi, mkv, webm, mov, gif).

    Returns:
        uint8 [frames, H, W, 3].

    Raises:
        ValueError: it cannot be opened or decoded, has no frames, or breaks off; the message names the file.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install av") from error
    try:
        times, announced = _index(path, av)
        if not len(times):
            raise ValueError("it has no frames")
        if len(times) < COMPLETE * announced:
            raise ValueError(f"it breaks off: {len(times)} of {announced} frames are there")
        wanted = uniform(len(times), frames)
        if len(times) > SEEK_ABOVE and not np.isnan(times).any() and (np.diff(times) > 0).all():
            found = _seek(path, times[wanted], av)
        else:
            found = None
        if found is None:
            found = _decode(path, wanted, len(times), av)
    except (ValueError, OSError, av.FFmpegError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"video {path} cannot be read ({what}); replace the file or leave the sample out") from error
    return np.stack(found)


def _index(path, av) -> tuple[np.ndarray, int]:
    """Presentation times of all frames, ascending (NaN where unknown), and how many the container announces.

    Raises:
        ValueError: no video stream, or the file ends before its announced duration (Matroska, WebM) or trailer (GIF).
    """
    with open(path, "rb") as file:
        if file.read(3) == b"GIF":
            file.seek(-min(16, file.seek(0, 2)), 2)
            if not file.read().rstrip(b"\0\r\n ").endswith(b";"):
                raise ValueError("it breaks off: a GIF ends with a semicolon")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video stream")
        stream = container.streams.video[0]
        shown = [
            np.nan if packet.pts is None else float(packet.pts)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
        times = np.sort(np.array(shown))
        if len(times) > 1 and (announced := _seconds(stream.metadata.get("DURATION", ""))):
            there = float((times[-1] - times[0]) * stream.time_base) * len(times) / (len(times) - 1)
            if there < COMPLETE * announced:
                raise ValueError(f"it breaks off: {there:.1f} of {announced:.1f} seconds are there")
        return times, stream.frames


def _seconds(text: str) -> float:
    """`00:01:02.5` -> 62.5; 0 for anything else."""
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text)
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else 0.0


def _decode(path, wanted: np.ndarray, count: int, av) -> list[np.ndarray]:
    """The wanted frames, by decoding up to the last one; a few missing at the end are made up for by choosing anew."""
    kept, n = {}, 0
    last = int(wanted[-1])
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if n in wanted:
                kept[n] = frame.to_ndarray(format="rgb24")
            n += 1
            if n > last:
                break
    if n <= last:
        if n < COMPLETE * count:
            raise ValueError(f"it breaks off: {n} of {count} frames can be decoded")
        return _decode(path, uniform(n, len(wanted)), n, av)
    return [kept[int(i)] for i in wanted]


def _seek(path, times: np.ndarray, av) -> list[np.ndarray] | None:
    """The frames of these presentation times; None if one is not found exactly."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for time in times:
            container.seek(int(time), stream=stream, backward=True, any_frame=False)
            frame = next((f for f in container.decode(stream) if f.pts is not None and f.pts >= time), None)
            if frame is None or frame.pts != time:
                return None
            found.append(frame.to_ndarray(format="rgb24"))
    return found
