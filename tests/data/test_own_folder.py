"""Foreign files are not counted, reused, overwritten or deleted: records, checkpoints, results, caches."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from iptv2_diffusion.data.latent_cache import _is_shard
from iptv2_diffusion.data.own_folder import RECORD, ForeignFolderError, OwnFolder
from iptv2_diffusion.data.patches import ImageStore
from iptv2_diffusion.evaluation.results import replaced
from iptv2_diffusion.evaluation.sample_folder import SampleFolder
from iptv2_diffusion.files import atomic, inside, printable, user_path
from iptv2_diffusion.training.loop import claim_run_folder


def write(folder: OwnFolder, name: str, content: bytes = b"ours") -> None:
    with folder.writing(name) as temporary:
        temporary.write_bytes(content)


class TestRecord:
    def test_a_folder_with_foreign_files_is_refused_and_they_are_named(self, tmp_path):
        (tmp_path / "holiday.png").write_bytes(b"mine")
        with pytest.raises(ForeignFolderError, match=r"has no record of results and holds 1 entries .* holiday\.png"):
            OwnFolder.claim(tmp_path, "results")
        assert os.listdir(tmp_path) == ["holiday.png"]

    @pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "train.log", "slurm-1.out", ".hidden"])
    def test_files_of_desktops_and_shells_do_not_count(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"x")
        OwnFolder.claim(tmp_path, "results")
        assert (tmp_path / name).read_bytes() == b"x"

    def test_only_what_is_recorded_is_held_and_deleted(self, tmp_path):
        folder = OwnFolder.claim(tmp_path / "new" / "folder", "results")
        write(folder, "a/b.png")
        (folder.folder / "a" / "mine.png").write_bytes(b"mine")
        again = OwnFolder.claim(folder.folder, "results")
        assert again.holds("a/b.png")
        assert not again.holds("a/mine.png")
        again.delete()
        assert {p.name for p in folder.folder.rglob("*") if p.is_file()} == {RECORD, "mine.png"}

    def test_a_foreign_file_of_the_same_name_is_not_overwritten(self, tmp_path):
        folder = OwnFolder.claim(tmp_path, "results")
        (tmp_path / "a.png").write_bytes(b"mine")
        with pytest.raises(ForeignFolderError, match=r"a\.png was not made here; move it away"):
            write(folder, "a.png")
        assert (tmp_path / "a.png").read_bytes() == b"mine"

    def test_a_file_of_changed_size_is_not_ours(self, tmp_path):
        folder = OwnFolder.claim(tmp_path, "results")
        write(folder, "a.png")
        (tmp_path / "a.png").write_bytes(b"longer than ours")
        assert not folder.holds("a.png")
        write(folder, "a.png", b"ours again")  # the file is ours
        assert folder.holds("a.png")

    def test_a_folder_of_another_kind_is_refused(self, tmp_path):
        OwnFolder.claim(tmp_path, "restored pictures")
        with pytest.raises(ForeignFolderError, match="holds restored pictures, not a training run"):
            claim_run_folder(tmp_path)

    def test_several_processes_and_lines_that_a_kill_cut(self, tmp_path):
        OwnFolder.claim(tmp_path, "results")
        write(OwnFolder(tmp_path, "results", process=1), "b.png")
        write(OwnFolder(tmp_path, "results", process=0), "a.png")
        with (tmp_path / f"{RECORD}-1").open("a") as file:
            file.write('{"file": "c.p')
        both = OwnFolder(tmp_path, "results")
        assert both.holds("a.png")
        assert both.holds("b.png")
        assert set(both.files) == {"a.png", "b.png"}

    @pytest.mark.parametrize(
        "line", ["3", "null", "[]", '{"file": "a"}', '{"file": "a", "bytes": "1"}', '{"file": 1}', "{", "[" * 100_000]
    )
    def test_lines_that_are_not_ours_are_passed_over(self, tmp_path, line):
        OwnFolder.claim(tmp_path, "test files").record("b", 1)
        with (tmp_path / RECORD).open("a") as file:
            file.write(f"{line}\n")
        assert OwnFolder(tmp_path, "test files").files == {"b": 1}

    def test_a_failed_writing_leaves_nothing(self, tmp_path):
        folder = OwnFolder.claim(tmp_path, "results")

        def fail():
            with folder.writing("a.png") as temporary:
                temporary.write_bytes(b"half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert os.listdir(tmp_path) == [RECORD]

    @pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", ".", "a\0b", "..", "a/.."])
    def test_names_that_leave_the_folder(self, tmp_path, name):
        folder = OwnFolder.claim(tmp_path / "in", "results")
        with pytest.raises(ValueError, match="does not stay inside"):
            write(folder, name)
        (tmp_path / "x").write_bytes(b"mine")
        with (folder.folder / RECORD).open("a") as file:  # a record that someone else wrote
            file.write(json.dumps({"file": "../x", "bytes": 4}) + "\n")
        OwnFolder(folder.folder, "results").delete()
        assert (tmp_path / "x").read_bytes() == b"mine"


class TestFiles:
    def test_temporary_names_are_short(self, tmp_path):
        path = tmp_path / ("x" * 251 + ".png")
        with atomic(path) as temporary:
            assert len(temporary.name) < 40
            assert temporary.suffix == ".png"
            temporary.write_bytes(b"x")
        assert path.read_bytes() == b"x"

    def test_paths_of_users(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert user_path("~/a b") == tmp_path / "a b"
        assert str(user_path("a/~")) == "a/~"
        assert inside(tmp_path, "a/../b") == tmp_path / "b"
        assert printable("a\nb\udce9é") == "a\\nb\\udce9é"


class TestSamples:
    ABOUT = {"pipeline": "p", "versions": {}, "recipe": {"seed": 0}}

    def image(self, size=(16, 16)):
        return np.zeros((*size, 3), np.uint8)

    def test_a_stray_image_is_not_taken_for_ours(self, tmp_path):
        (tmp_path / "s" / "images").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "s" / "images" / "000000.png")
        folder = SampleFolder(tmp_path / "s", size=(16, 16))
        assert not folder.has(0)
        with pytest.raises(ForeignFolderError, match="has no record of generated images"):
            folder.prepare(self.ABOUT, overwrite=True)
        assert Image.open(tmp_path / "s" / "images" / "000000.png").size == (32, 32)

    def test_overwrite_deletes_our_images_alone(self, tmp_path):
        folder = SampleFolder(tmp_path, size=(16, 16))
        folder.prepare(self.ABOUT, overwrite=False)
        folder.write(0, self.image())
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / "holiday.png")
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / "000001.png")
        folder.refresh()
        assert folder.has(0)
        assert not folder.has(1)
        folder.prepare(self.ABOUT, overwrite=True)
        assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["000001.png", "holiday.png"]
        with pytest.raises(ForeignFolderError, match=r"000001\.png was not made here"):
            folder.write(1, self.image())

    @pytest.mark.parametrize("change", ["size", "mode", "cut"])
    def test_an_image_of_another_size_or_mode_is_drawn_again(self, tmp_path, change):
        folder = SampleFolder(tmp_path, size=(16, 16))
        folder.prepare(self.ABOUT, overwrite=False)
        folder.write(0, self.image())
        path = folder.path(0)
        if change == "cut":
            path.write_bytes(path.read_bytes()[:-3])
        else:
            Image.new("L" if change == "mode" else "RGB", (16, 16) if change == "mode" else (8, 8)).save(path)
            folder.own.record(folder.name(0), path.stat().st_size)  # even if the size in bytes were the same
        assert not folder.has(0)

    def test_the_npz_refuses_images_of_several_sizes(self, tmp_path):
        from iptv2_diffusion.training.errors import UserError

        folder = SampleFolder(tmp_path)
        folder.prepare(self.ABOUT, overwrite=False)
        folder.write(0, self.image())
        folder.write(1, self.image((8, 8)))
        with pytest.raises(UserError, match=r"000001\.png is \(8, 8, 3\), not 16x16 pixels of RGB"):
            folder.write_npz(None, 2)
        assert not list(tmp_path.glob("*.npz"))

    def test_folders_of_earlier_versions_still_work(self, tmp_path):
        (tmp_path / "images").mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / "000000.png")
        Image.new("RGB", (9, 9)).save(tmp_path / "images" / "holiday.png")
        (tmp_path / "generation.json").write_text(json.dumps(self.ABOUT))
        folder = SampleFolder(tmp_path, size=(16, 16))
        folder.prepare(self.ABOUT, overwrite=False)
        assert folder.has(0)
        folder.prepare(self.ABOUT, overwrite=True)
        assert [p.name for p in (tmp_path / "images").iterdir()] == ["holiday.png"]


class TestRuns:
    def test_a_run_folder_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "holiday.png").write_bytes(b"mine")
        with pytest.raises(ForeignFolderError, match="has no record of a training run"):
            claim_run_folder(tmp_path)

    def test_runs_of_earlier_versions_resume(self, tmp_path):
        for name in ("config.yaml", "metrics.jsonl", "notes.txt"):
            (tmp_path / name).write_text("x")
        claim_run_folder(tmp_path)
        assert (tmp_path / RECORD).is_file()

    def test_results_replace_ours_and_keep_what_is_not(self, tmp_path):
        claim_run_folder(tmp_path)
        for round_ in ("first", "second"):
            with replaced(tmp_path / "pipeline") as temporary:
                (temporary / "model").mkdir(parents=True)
                (temporary / "model" / "config.json").write_text(round_)
                if round_ == "first":
                    (temporary / "model" / "weights-00002.safetensors").write_text("stale")
            (tmp_path / "pipeline" / "model" / "NOTES.md").write_text("mine")
        found = {p.relative_to(tmp_path / "pipeline").as_posix() for p in (tmp_path / "pipeline").rglob("*.*")}
        assert found == {"model/config.json", "model/NOTES.md"}
        assert (tmp_path / "pipeline/model/config.json").read_text() == "second"
        assert (tmp_path / "pipeline/model/NOTES.md").read_text() == "mine"
        assert not list(tmp_path.glob(".tmp-*"))

    def test_a_failure_leaves_the_previous_result(self, tmp_path):
        claim_run_folder(tmp_path)
        with replaced(tmp_path / "vae") as temporary:
            temporary.mkdir()
            (temporary / "a.json").write_text("whole")

        def interrupted():
            with replaced(tmp_path / "vae") as temporary:
                temporary.mkdir()
                (temporary / "a.json").write_text("ha")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert (tmp_path / "vae" / "a.json").read_text() == "whole"


class TestCaches:
    def test_a_complete_foreign_file_is_not_a_shard(self, tmp_path):
        path = tmp_path / "shard-00000000-00000008.safetensors"
        save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="holds no latents that were made here; move it away"):
            _is_shard(path)
        path.write_bytes(path.read_bytes()[:-1])
        assert not _is_shard(path)

    def test_decoded_pixels_that_were_cut_are_decoded_again(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        said = []
        for damage in (None, "cut", "index"):
            (raw,) = list((tmp_path / "cache").glob("*.raw")) or [None]
            if damage == "cut":
                raw.write_bytes(raw.read_bytes()[:-5])
            if damage == "index":
                raw.with_suffix(".json").write_text("[")
            store = ImageStore([tmp_path / "a.png"], tmp_path / "cache", say=said.append)
            assert np.array_equal(store.images[0], pixels)
        assert len(said) == 3
        assert re.search("decoding 1 images", said[0])
