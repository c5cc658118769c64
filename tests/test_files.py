"""Files appear complete or not at all, for any name, with other writers, and when the writer dies."""

import os
import subprocess
import sys

import pytest

from iptv2_diffusion.files import atomic, is_left_behind


def test_a_file_takes_its_place_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "new")]


@pytest.mark.parametrize("durable", [True, False])
def test_a_failed_block_leaves_what_was_there_and_nothing_else(tmp_path, durable):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyError), atomic(path, durable=durable) as temporary:
        {}[temporary.write_text("half")]
    with pytest.raises(FileNotFoundError), atomic(path, durable=durable):
        pass  # nothing was written
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_the_longest_names_work(tmp_path):
    path = tmp_path / ("é" * 125 + ".png")  # 254 bytes of the 255 that file systems allow
    with atomic(path) as temporary:
        temporary.write_bytes(b"x")
    assert path.read_bytes() == b"x"


def test_files_written_at_the_same_time_do_not_meet(tmp_path):
    with atomic(tmp_path / "a.png") as one, atomic(tmp_path / "b.png") as other:
        one.write_bytes(b"a")
        other.write_bytes(b"b")
    assert [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")] == [b"a", b"b"]


def test_files_of_a_killed_process_are_recognised(tmp_path):
    script = (
        "import os, sys; from iptv2_diffusion.files import atomic\n"
        "with atomic(sys.argv[1]) as temporary:\n    temporary.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.png")])
    (left,) = tmp_path.iterdir()
    assert is_left_behind(left)
    with atomic(tmp_path / "b.png") as mine:
        mine.write_bytes(b"")
        assert not is_left_behind(mine)  # this process runs
    elsewhere = left.with_name(left.name.replace(left.name.split("-")[1], "0" * 8))
    assert not is_left_behind(elsewhere)  # from another machine, whose processes are unknown here
    assert not is_left_behind(tmp_path / f".tmp-{os.getpid()}")
