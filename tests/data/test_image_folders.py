"""Interpretation of folders and tars of images: splits, classes, metadata, ignored files; and broken data."""

import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import datasets
import pytest
from PIL import Image

from iptv2_diffusion.data.images import ImageTensors, class_names, load_image_dataset, load_train_and_heldout
from iptv2_diffusion.data.pairs import find_images


def picture(path: Path, colour="red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def tree(root: Path, *names: str) -> Path:
    for name in names:
        picture(root / name)
    return root


def tarred(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def png(tmp_path):
    return picture(tmp_path / "one.png").read_bytes()


class TestFolders:
    @pytest.mark.parametrize(
        "junk", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "$RECYCLE.BIN", "lost+found", "@EADIR"]
    )
    def test_folders_of_tools_are_not_classes(self, tmp_path, junk):
        data = load_image_dataset(tree(tmp_path, "cat/a.png", "dog/b.png", f"{junk}/c.png", f"cat/{junk}/d.png"))
        assert class_names(data) == ["cat", "dog"]
        assert len(data) == 2
        assert len(find_images(tmp_path)) == 2

    def test_hidden_files_are_not_images(self, tmp_path):
        (tree(tmp_path, "cat/a.png") / "cat" / "._a.png").write_bytes(b"resource fork")
        assert len(load_image_dataset(tmp_path)) == 1

    @pytest.mark.parametrize(
        ("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation"), ("train", "val")]
    )
    def test_splits_in_any_case_and_by_their_usual_names(self, tmp_path, train, test):
        tree(tmp_path, f"{train}/cat/a.png", f"{train}/dog/b.png", f"{test}/cat/c.png")
        assert class_names(load_image_dataset(tmp_path)) == ["cat", "dog"]
        assert len(load_image_dataset(tmp_path)) == 2
        split = "test" if test.lower().startswith("test") else "validation"
        assert len(load_image_dataset(tmp_path, split=split)) == 1
        with pytest.raises(ValueError, match=r'no split "heldout"; the splits are: '):
            load_image_dataset(tmp_path, split="heldout")

    def test_two_folders_of_one_split(self, tmp_path):
        tree(tmp_path, "val/a.png", "validation/b.png", "train/c.png")
        assert len(load_image_dataset(tmp_path, split="val")) == 1
        with pytest.raises(ValueError, match='split "dev" may be any of val, validation; name one'):
            load_image_dataset(tmp_path, split="dev")

    def test_a_split_folder_without_images_is_not_a_split(self, tmp_path):
        (tree(tmp_path, "cat/a.png", "dog/b.png") / "test").mkdir()
        assert class_names(load_image_dataset(tmp_path)) == ["cat", "dog"]

    def test_links_are_followed_once(self, tmp_path):
        tree(tmp_path / "elsewhere", "cat/a.png", "dog/b.png")
        root = tmp_path / "data"
        root.mkdir()
        (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
        (root / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
        (tmp_path / "elsewhere" / "dog" / "back").symlink_to(root)  # a circle
        data = load_image_dataset(root)
        assert class_names(data) == ["cat", "dog"]
        assert len(data) == 2
        assert len(find_images(root)) == 2

    def test_a_class_without_a_readable_image_is_dropped_and_reported(self, tmp_path):
        tree(tmp_path, "cat/a.png", "dog/b.png")
        (tmp_path / "broken").mkdir()
        for name in ("x.png", "y.png"):
            (tmp_path / "broken" / name).write_bytes(b"not an image")
        with pytest.warns(UserWarning, match=r"left out 2 files: 2 \.png \(no readable image in broken\)"):
            data = load_image_dataset(tmp_path)
        assert class_names(data) == ["cat", "dog"]

    def test_pictures_left_out_are_counted_by_suffix(self, tmp_path):
        tree(tmp_path, "cat/a.png")
        for name in ("b.jfif", "c.AVIF", "d.heic", "e.heic", "notes.txt"):
            (tmp_path / "cat" / name).write_bytes(b"x")
        expected = r"left out 4 files: 1 \.avif \(unsupported suffix\), 2 \.heic .*, 1 \.jfif"
        with pytest.warns(UserWarning, match=expected):
            load_image_dataset(tmp_path)

    def test_one_line_says_what_was_understood(self, tmp_path):
        labelled = load_image_dataset(tree(tmp_path / "a", "cat/a.png", "dog/b.png", "eel/c.png"))
        assert labelled.info.description == "3 classes from sub-folders: cat, dog, eel"
        flat = load_image_dataset(tree(tmp_path / "b", "a.png"))
        assert flat.info.description == "no labels: the images are not in sub-folders"

    @pytest.mark.skipif(os.name == "nt", reason="names there are no bytes")
    def test_a_name_that_is_not_utf8_is_left_out_by_name(self, tmp_path):
        tree(tmp_path, "cat/a.png")
        os.rename(picture(tmp_path / "cat" / "b.png"), os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
        with pytest.warns(UserWarning, match=r"with a name that is not UTF-8 \(caf.*udce9\.png\)"):
            assert len(load_image_dataset(tmp_path)) == 1
        assert len(find_images(tmp_path)) == 2  # restoration reads it, because it stores no names in tables

    def test_links_to_nothing_are_counted_and_pipes_left_out(self, tmp_path):
        """As git-annex leaves images that were not fetched; a pipe would be read forever."""
        tree(tmp_path, "cat/a.png", "dog/b.png")
        (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "absent.png")
        (tmp_path / "dog" / "circle.png").symlink_to("circle.png")
        os.mkfifo(tmp_path / "cat" / "pipe.png")
        with pytest.warns(UserWarning, match=r"left out 2 files: 2 \.png \(broken link\)"):
            assert len(load_image_dataset(tmp_path)) == 2
        assert [path.name for path in find_images(tmp_path)] == ["a.png", "gone.png", "b.png", "circle.png"]

    @pytest.mark.parametrize("suffix", [".tar", ".parquet"])
    def test_a_pipe_is_no_archive(self, tmp_path, suffix):
        os.mkfifo(tmp_path / f"x{suffix}")
        with pytest.raises(FileNotFoundError, match=f"no such {suffix[1:]} file"):
            load_image_dataset(tmp_path / f"x{suffix}")


class TestMetadata:
    def write(self, root, form, rows):
        if form == "csv":
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            (root / "metadata.csv").write_text("\n".join(lines))
        else:
            (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    @pytest.mark.parametrize("form", ["csv", "jsonl"])
    @pytest.mark.parametrize("labels", [("pear", "apple"), (1, 0)])
    def test_labels_next_to_the_images(self, tmp_path, form, labels):
        tree(tmp_path, "a.png", "sub/b.png")
        rows = [{"file_name": name, "label": label} for name, label in zip(("a.png", "sub/b.png"), labels, strict=True)]
        self.write(tmp_path, form, rows)
        data = load_image_dataset(tmp_path)
        assert class_names(data) == (["apple", "pear"] if labels[0] == "pear" else ["0", "1"])
        assert data["label"] == [1, 0]
        assert f"of metadata.{form}" in data.info.description
        assert class_names(load_image_dataset(tmp_path, label_column="ignore")) is None

    def test_a_column_by_name_and_images_without_a_row(self, tmp_path):
        tree(tmp_path, "train/a.png", "train/b.png", "train/c.png", "test/d.png")
        self.write(
            tmp_path / "train", "csv", [{"file_name": "a.png", "kind": "x"}, {"file_name": "b.png", "kind": "y"}]
        )
        with pytest.warns(UserWarning, match=r"1 \.png \(without a label in metadata\.csv\)"):
            data = load_image_dataset(tmp_path, label_column="kind")
        assert class_names(data) == ["x", "y"]

    def test_a_broken_file_is_named(self, tmp_path):
        tree(tmp_path, "a.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "lab')
        with pytest.raises(ValueError, match=r"metadata\.jsonl cannot be read"):
            load_image_dataset(tmp_path)
        (tmp_path / "metadata.jsonl").write_text('{"label": 3}')
        with pytest.raises(ValueError, match="every row needs a file_name, but the columns are label"):
            load_image_dataset(tmp_path)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("file_name;label\na.png;0\n", "the columns are file_name;label; separate the columns by commas"),
            ("file_name\tlabel\na.png\t0\n", "separate the columns by commas"),
            ("FILE_NAME,LABEL\na.png,0\n", "every row needs a file_name"),
            ("file_name,label\na.png,0\na.png,1\n", r"two rows for a\.png, which differ"),
            ("file_name,label\na.png,0\n./a.png,1\n", r"two rows for \./a\.png, which differ"),
            ("file_name,label\na.png,-1\nb.png,0\n", "has the label -1; labels start at 0"),
            ("file_name,label\na.png,0.0\nb.png,1.0\n", r"has the label 0\.0, neither a class number nor a name"),
            ("file_name,label\na.png,123456\nb.png,0\n", "goes up to 123456"),
            ("file_name,label\na.png,0\n".encode("utf-16"), r"metadata\.csv cannot be read: 'utf-8' codec"),
            ('{"file_name": "a.png", "label": [1, 2]}', r"has the label \[1, 2\], neither"),
            ('{"file_name": "a.png", "label": {"a": 1}}', "has the label {'a': 1}, neither"),
            ('{"file_name": "a.png", "label": true}', "has the label True, neither"),
            ('{"file_name": "a.png", "label": NaN}', "has the label nan, neither"),
            ('{"file_name": "a.png", "label": 0.5}', r"has the label 0\.5, neither"),
            (f'{{"file_name": "a.png", "label": {10**30}}}', "has the label 1000.*, neither"),
            ('{"file_name": null, "label": 1}', "every row needs a file_name"),
            ("[1]", r"metadata\.jsonl cannot be read"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*without a label")
    def test_labels_that_are_none(self, tmp_path, text, told):
        tree(tmp_path, "a.png", "b.png")
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / ("metadata.jsonl" if content[:1] in (b"{", b"[") else "metadata.csv")).write_bytes(content)
        with pytest.raises(ValueError, match=told) as caught:
            load_image_dataset(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("metadata.csv", "\ufefffile_name,label\r\na.png,1\r\nb.png,0\r\n"),
            ("metadata.csv", 'file_name,text,label\na.png,"x\ny",1\nb.png,"z\u2028",0\n'),
            ("metadata.csv", "file_name,label\na.png,1\na.png,1\nb.png,0,9,9\n"),
            (
                "metadata.jsonl",
                '{"file_name": "a.png", "label": 1, "x": "\u2028"}\n\n{"file_name": "b.png", "label": 0}\n',
            ),
        ],
        ids=["byte order mark", "breaks of lines in quotes", "equal rows", "breaks of lines in JSON"],
    )
    def test_rows_are_read_as_their_writers_meant_them(self, tmp_path, name, text):
        tree(tmp_path, "a.png", "b.png")
        (tmp_path / name).write_bytes(text.encode())
        assert load_image_dataset(tmp_path)["label"] == [1, 0]

    def test_rows_of_other_images_are_told(self, tmp_path):
        tree(tmp_path, "a.png", "b.png")
        (tmp_path / "metadata.csv").write_text("file_name,label\na,0\nb,1\n")
        with pytest.warns(UserWarning, match=r"no labels: metadata\.csv names none of the images, but a"):
            assert class_names(load_image_dataset(tmp_path)) is None


class TestTars:
    @pytest.mark.parametrize("around", ["", "dataset/", "./"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_class_folders_keep_their_labels(self, tmp_path, png, around, streaming):
        names = ("cat/a.png", "dog/b.png", "cat/c.png", "__MACOSX/cat/._a.png", "dog/.DS_Store")
        path = tarred(tmp_path / "x.tar", {f"{around}{name}": png for name in names})
        data = load_image_dataset(path, streaming=streaming)
        assert class_names(data) == ["cat", "dog"]
        rows = list(data)
        assert sorted(row["label"] for row in rows) == [0, 0, 1]
        if not streaming:
            assert ImageTensors(data, size=8)[0]["pixel_values"].shape == (3, 8, 8)

    def test_splits_inside(self, tmp_path, png):
        path = tarred(tmp_path / "x.tar", dict.fromkeys(("Train/cat/a.png", "Train/dog/b.png", "Test/cat/c.png"), png))
        train, heldout = load_train_and_heldout(path, heldout_split="test")
        assert class_names(train) == ["cat", "dog"]
        assert (len(train), len(heldout)) == (2, 1)

    @pytest.mark.parametrize("form", ["folders", "tars", "samples"])
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_tar_that_is_cut_short_is_named_in_one_line(self, tmp_path, png, form, share, streaming):
        big = png + b"x" * 20_000
        if form == "tars":
            inner = tarred(tmp_path / "inner.tar", {f"{i}.png": big for i in range(4)}).read_bytes()
            contents = {"cat.tar": inner, "dog.tar": inner}
        elif form == "folders":
            contents = {f"{'cat' if i % 2 else 'dog'}/{i}.png": big for i in range(8)}
        else:
            contents = {f"{i:02d}.{s}": (big if s == "png" else b"1") for i in range(8) for s in ("cls", "png")}
        path = tarred(tmp_path / "x.tar", contents)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(ValueError, match=r"x\.tar") as caught:
            list(load_image_dataset(path, streaming=streaming, cache_dir=tmp_path / "cache"))
        assert "\n" not in str(caught.value)

    def test_a_broken_inner_tar_is_named(self, tmp_path, png):
        inner = tarred(tmp_path / "inner.tar", {"a.png": png}).read_bytes()
        path = tarred(tmp_path / "x.tar", {"cat.tar": inner, "dog.tar": b"broken" * 200})
        with pytest.raises(ValueError, match=r"x\.tar: its inner tar dog\.tar is damaged"):
            load_image_dataset(path, cache_dir=tmp_path / "cache")

    def test_files_that_are_not_tars(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"garbage" * 1000)
        with pytest.raises(ValueError, match=r"x\.tar: damaged, or not a tar"):
            load_image_dataset(tmp_path / "x.tar")

    def test_names_that_leave_the_archive_are_left_out(self, tmp_path, png):
        path = tarred(
            tmp_path / "x.tar", dict.fromkeys(("cat/a.png", "../../cat/b.png", "/etc/c.png", "dog/d.png"), png)
        )
        assert len(load_image_dataset(path)) == 2

    def test_links_devices_and_sparse_files_are_counted(self, tmp_path, png):
        path = tarred(tmp_path / "x.tar", {"cat/a.png": png, "dog/b.png": png})
        odd = tmp_path / "odd.tar"
        with tarfile.open(path) as whole, tarfile.open(odd, "w") as archive:
            for member in whole:
                archive.addfile(member, whole.extractfile(member))
            for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
                member = tarfile.TarInfo(f"cat/{number}.png")
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
        with pytest.warns(UserWarning, match=r"left out 4 files: 4 \.png \(link, device or sparse file in a tar\)"):
            assert len(load_image_dataset(odd)) == 2

    def test_the_last_of_two_members_of_one_name_counts(self, tmp_path, png):
        whole = tarred(tmp_path / "x.tar", {"cat/a.png": b"old", "dog/a.png": png}).read_bytes()
        second = tarred(tmp_path / "y.tar", {"cat/a.png": png}).read_bytes()
        (tmp_path / "x.tar").write_bytes(whole[:2048] + second)
        data = load_image_dataset(tmp_path / "x.tar")
        assert ImageTensors(data, size=8).valid_indices() == [0, 1]

    @pytest.mark.parametrize(
        ("contents", "told"),
        [
            ({}, r"x\.tar: holds no files"),
            ({"cat.tar": {}}, r"x\.tar: its inner tars hold no images"),
            ({"cat.tar": {"a.tar": {"b.png": b""}}}, r"x\.tar: its inner tars hold no images"),
        ],
        ids=["empty", "of empty ones", "three deep"],
    )
    def test_a_tar_without_images(self, tmp_path, contents, told):
        def build(contents):
            packed = {name: build(c) if isinstance(c, dict) else c for name, c in contents.items()}
            return tarred(tmp_path / "x.tar", packed).read_bytes()

        build(contents)
        with pytest.raises(ValueError, match=told):
            load_image_dataset(tmp_path / "x.tar", cache_dir=tmp_path / "cache")


class TestNames:
    @pytest.mark.parametrize("name", ["x.zip", "x.tar.gz", "x.tgz", "x.tar.xz"])
    def test_archives_that_are_there_are_not_missing(self, tmp_path, name):
        path = tmp_path / "with space" / name
        path.parent.mkdir()
        path.write_bytes(b"PK")
        with pytest.raises(
            ValueError, match=r"not read in place; unpack it by .*'.*with space/x\..*' ?.* name the folder"
        ):
            load_image_dataset(path)

    def test_brackets_are_not_a_pattern_if_the_file_exists(self, tmp_path, png):
        folder = tmp_path / "set [1]"
        folder.mkdir()
        tarred(folder / "a[0].tar", {"00.png": png, "00.cls": b"1", "01.png": png, "01.cls": b"0"})
        for source in (folder / "a[0].tar", folder):
            data = load_image_dataset(source, cache_dir=tmp_path / "cache")
            assert data["label"] == [1, 0]
        columns = {"image": [{"bytes": png, "path": None}]}
        features = datasets.Features({"image": datasets.Image()})
        (tmp_path / "pq [x]").mkdir()
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "pq [x]" / "a[1].parquet")
        assert len(load_image_dataset(tmp_path / "pq [x]" / "a[1].parquet", cache_dir=tmp_path / "cache")) == 1
        assert len(load_image_dataset(tmp_path / "pq [x]", cache_dir=tmp_path / "cache")) == 1
        assert len(load_image_dataset(tree(tmp_path / "images [2]", "cat/a.png"))) == 1

    def test_home_folders(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        tree(tmp_path / "mine", "a.png")
        assert len(load_image_dataset("~/mine")) == 1
        assert len(find_images("~/mine")) == 1


class TestColumns:
    def saved(self, tmp_path, columns, features):
        path = tmp_path / "x.parquet"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
        return path

    @pytest.mark.parametrize(
        ("labels", "feature", "message"),
        [
            ([[1, 2], [0]], datasets.List(datasets.Value("int64")), "neither class numbers nor names"),
            ([0.5, 1.0], datasets.Value("float32"), "holds float32, neither class numbers nor names"),
            ([True, False], datasets.Value("bool"), "holds bool"),
            ([None, 1], datasets.Value("int64"), "rows without a label"),
            ([-1, 1], datasets.Value("int64"), "has the label -1; labels start at 0"),
            ([0, 10**9], datasets.Value("int64"), "are these numbers of images"),
        ],
    )
    def test_labels_that_are_not_labels(self, tmp_path, png, labels, feature, message):
        columns = {"image": [{"bytes": png, "path": None}] * 2, "label": labels}
        path = self.saved(tmp_path, columns, {"image": datasets.Image(), "label": feature})
        with pytest.raises(ValueError, match=message) as caught:
            load_image_dataset(path, cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert len(load_image_dataset(path, label_column="ignore", cache_dir=tmp_path / "cache")) == 2

    def test_lists_of_images(self, tmp_path, png):
        columns = {"image": [[{"bytes": png, "path": None}]]}
        path = self.saved(tmp_path, columns, {"image": datasets.List(datasets.Image())})
        with pytest.raises(ValueError, match=r'column "image" holds .*, not one image per row'):
            load_image_dataset(path, cache_dir=tmp_path / "cache")

    @pytest.mark.parametrize("split", ["train[1:1]", "train[9:]", "train[2:1]", "train[x]", "train[:900%]", "train["])
    def test_a_pipeline_part_that_is_empty_or_missing(self, tmp_path, split):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                data = load_image_dataset(tree(tmp_path, "cat/a.png", "cat/b.png"), split=split)
            except ValueError as error:
                data, told = None, str(error)
        if data is None:
            assert "\n" not in told
            assert "images" in told or "split" in told
        else:
            assert len(data) > 0
