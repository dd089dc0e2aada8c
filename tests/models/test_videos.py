"""Frames of video files: the right ones, from whatever container, or an error that names the file."""

import io

import av
import numpy as np
import pytest

from sparsevlm.models import videos
from sparsevlm.models.media import is_video, sample_frames
from sparsevlm.models.videos import read_frames, uniform

SIZE = 64


def write(path, frames=40, codec="libx264", **options):
    """A bright column that moves by one pixel a frame, so that a frame tells its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for i in range(frames):
            picture = np.zeros((SIZE, SIZE, 3), np.uint8)
            picture[:, i % SIZE] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return path


def numbers(frames) -> list[int]:
    """Which frames these are."""
    return [int(np.asarray(f).sum(axis=(0, 2)).argmax()) for f in frames]


EIGHT_OF_40 = [0, 5, 11, 16, 22, 27, 33, 39]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx"),
        ("a.mov", "mpeg4"),
        ("a.gif", "gif"),
    ],
)
def test_eight_frames_first_and_last_included(tmp_path, name, codec):
    frames = read_frames(write(tmp_path / name, codec=codec), 8)
    assert frames.shape == (8, SIZE, SIZE, 3) and frames.dtype == np.uint8
    found = numbers(frames)
    assert all(abs(a - b) <= 1 for a, b in zip(found, EIGHT_OF_40, strict=True))  # codecs smear a pixel
    assert found[0] == 0 and found[-1] == 39


def test_as_the_authors_choose_them():
    assert uniform(40, 8).tolist() == EIGHT_OF_40 == np.linspace(0, 39, 8, dtype=int).tolist()
    assert uniform(3, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert uniform(1, 2).tolist() == [0, 0]


@pytest.mark.parametrize("options", [{}, {"bf": "3", "g": "12"}, {"g": "5"}, {"bf": "0", "g": "250"}])
def test_jumping_to_frames_is_decoding_all_of_them(tmp_path, monkeypatch, options):
    path = write(tmp_path / "a.mp4", frames=60, **options)
    slow = read_frames(path, 8)
    monkeypatch.setattr(videos, "SEEK_ABOVE", 10)
    monkeypatch.setattr(videos, "_decode", lambda *_: pytest.fail("decoded all"))
    assert np.array_equal(read_frames(path, 8), slow)


def test_short_videos_repeat_frames(tmp_path):
    assert numbers(read_frames(write(tmp_path / "a.mp4", frames=3), 8)) == [0, 0, 0, 0, 1, 1, 1, 2]


class TestDamage:
    def refused(self, path, why):
        with pytest.raises(ValueError, match=why) as error:
            read_frames(path, 8)
        assert str(path) in str(error.value) and "replace the file or leave the sample out" in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_cut_off_behind_an_index_at_the_front(self, tmp_path, share):
        path = write(tmp_path / "a.mp4")
        fast = tmp_path / "fast.mp4"
        with av.open(str(path)) as source, av.open(str(fast), "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        content = fast.read_bytes()
        fast.write_bytes(content[: int(len(content) * share)])
        self.refused(fast, "breaks off|Invalid data")

    @pytest.mark.parametrize(
        ("name", "codec", "why"),
        [
            ("a.avi", "mpeg4", "it breaks off: .* of 200 frames are there"),
            ("a.mkv", "libx264", "it breaks off: .* of 25.0 seconds are there"),
            ("a.webm", "libvpx", "it breaks off: .* of 25.0 seconds are there"),
            ("a.gif", "gif", "it breaks off: a GIF ends with a semicolon"),
        ],
    )
    def test_cut_off_where_the_rest_is_sound(self, tmp_path, name, codec, why):
        path = write(tmp_path / name, frames=200, codec=codec)
        assert len(read_frames(path, 8)) == 8
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.refused(path, why)

    def test_cut_off_before_its_index(self, tmp_path):
        path = write(tmp_path / "a.mp4")
        path.write_bytes(path.read_bytes()[:-800])
        self.refused(path, "cannot be read")

    @pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
    def test_no_video(self, tmp_path, content):
        path = tmp_path / "a.mp4"
        path.write_bytes(content)
        self.refused(path, "cannot be read")

    def test_no_file(self, tmp_path):
        self.refused(tmp_path / "nothing.mp4", "No such file")

    def test_sound_only(self, tmp_path):
        sound = io.BytesIO()
        with av.open(sound, "w", format="wav") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        path = tmp_path / "a.wav"
        path.write_bytes(sound.getvalue())
        self.refused(path, "holds no video stream")


def test_files_where_videos_are_expected(tmp_path):
    path = write(tmp_path / "a.mp4")
    assert is_video(path) and is_video(str(path)) and not is_video([path, path])
    assert numbers(sample_frames(path, 8, "x")) == numbers(read_frames(path, 8))
    with pytest.raises(ValueError, match="^video 0 of question 3: video .*nothing.mp4 cannot be read"):
        sample_frames(tmp_path / "nothing.mp4", 8, "video 0 of question 3")
