"""Stages: what is done is taken up, what changed is made anew, what is not ours is left alone."""

import json
from pathlib import Path

import pytest

from demo import stage as stages
from demo.stage import BEGUN, DONE, StageError, stage

KEY = {"recipe": 1}


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


class Making:
    """A stage's make that counts its calls and remembers what it found."""

    def __init__(self, result=None, stop=None):
        self.result, self.stop, self.found = result, stop, []

    def __call__(self, folder: Path):
        self.found.append(sorted(path.name for path in folder.iterdir() if path.name not in (BEGUN, DONE)))
        (folder / "part").mkdir(exist_ok=True)
        (folder / "part" / "weights").write_text("w")
        if self.stop:
            raise self.stop
        (folder / "figures").write_text("f")
        return self.result


def test_the_first_run_makes_and_the_second_takes_up(tmp_path):
    first = Making({"ok": True, "n": 3})
    done = stage(tmp_path, "a/b", KEY, first)
    assert (done.name, done.result, done.folder, done.taken_up) == ("a/b", first.result, tmp_path / "a" / "b", False)
    assert done.seconds >= 0
    second = Making("another")
    again = stage(tmp_path, "a/b", KEY, second)
    assert again == done._replace(taken_up=True)
    assert (first.found, second.found) == ([[]], [])


def test_a_folder_that_moved_is_taken_up(tmp_path):
    stage(tmp_path / "old", "a/b", KEY, Making(1))
    (tmp_path / "old").rename(tmp_path / "new")
    assert stage(tmp_path / "new", "a/b", KEY, Making(2)) == (
        "a/b", 1, tmp_path / "new" / "a" / "b", pytest.approx(0, abs=60), True,
    )  # fmt: skip


@pytest.mark.parametrize("depends", [{"recipe": 2}, {"recipe": 1, "code": "x"}, {}])
def test_another_key_begins_anew(tmp_path, depends):
    stage(tmp_path, "a/b", KEY, Making(1))
    other = Making(2)
    done = stage(tmp_path, "a/b", depends, other)
    assert (done.result, done.taken_up, other.found) == (2, False, [[]])


def test_the_order_of_the_key_is_no_change(tmp_path):
    stage(tmp_path, "a/b", {"x": 1, "y": 2}, Making(1))
    assert stage(tmp_path, "a/b", {"y": 2, "x": 1}, Making(2)).taken_up


def change_a_byte(folder):
    (folder / "figures").write_text("g")


def remove_a_file(folder):
    (folder / "part" / "weights").unlink()


def add_a_file(folder):
    (folder / "part" / "more").write_text("")


def damage_the_record(folder):
    (folder / DONE).write_text((folder / DONE).read_text()[:-5])


def replace_the_record(folder):
    (folder / DONE).write_text("[1, 2]")


def cut_the_record(folder):
    told = json.loads((folder / DONE).read_text())
    (folder / DONE).write_text(json.dumps({"key": told["key"], "files": told["files"]}))


@pytest.mark.parametrize(
    "change", [change_a_byte, remove_a_file, add_a_file, damage_the_record, replace_the_record, cut_the_record]
)
def test_changed_files_are_made_anew(tmp_path, change):
    change(stage(tmp_path, "a/b", KEY, Making(1)).folder)
    other = Making(2)
    done = stage(tmp_path, "a/b", KEY, other)
    assert (done.result, done.taken_up, len(other.found)) == (2, False, 1)
    # And is taken up from then on.
    assert stage(tmp_path, "a/b", KEY, Making(3)) == done._replace(taken_up=True)


def test_what_failed_is_not_taken_up(tmp_path):
    stage(tmp_path, "a/b", KEY, Making({"ok": False}))
    done = stage(tmp_path, "a/b", KEY, Making({"ok": True}))
    assert (done.result, done.taken_up) == ({"ok": True}, False)
    assert stage(tmp_path, "a/b", KEY, Making({"ok": False})).taken_up


@pytest.mark.parametrize("result", [0, None, [], {}, {"ok": None}, {"ok": 0}, False])
def test_only_ok_false_is_a_failure(tmp_path, result):
    stage(tmp_path, "a/b", KEY, Making(result))
    assert stage(tmp_path, "a/b", KEY, Making("another"))[1::3] == (result, True)


def test_fresh_begins_anew_in_an_empty_folder(tmp_path):
    stage(tmp_path, "a/b", KEY, Making(1))
    other = Making(2)
    done = stage(tmp_path, "a/b", KEY, other, fresh=True)
    assert (done.result, done.taken_up, other.found) == (2, False, [[]])


def test_tuples_are_the_same_on_both_runs(tmp_path):
    first = stage(tmp_path, "a/b", KEY, Making({"pairs": ((1, 2.5), ("x", None))}))
    assert first.result == {"pairs": [[1, 2.5], ["x", None]]}
    assert stage(tmp_path, "a/b", KEY, Making()).result == first.result


@pytest.mark.parametrize("error", [ValueError("no"), Stopped()])
def test_a_stopped_stage_finds_its_folder_as_it_left_it(tmp_path, error):
    with pytest.raises(type(error)):
        stage(tmp_path, "a/b", KEY, Making(stop=error))
    assert not (tmp_path / "a" / "b" / DONE).exists()
    other = Making(2)
    assert not stage(tmp_path, "a/b", KEY, other).taken_up
    assert other.found == [["part"]]


def test_a_stopped_stage_with_another_key_finds_nothing(tmp_path):
    with pytest.raises(Stopped):
        stage(tmp_path, "a/b", KEY, Making(stop=Stopped()))
    other = Making(2)
    stage(tmp_path, "a/b", {"recipe": 2}, other)
    assert other.found == [[]]


def test_a_stage_that_is_stopped_when_made_anew_is_not_done(tmp_path):
    folder = stage(tmp_path, "a/b", KEY, Making(1)).folder
    change_a_byte(folder)
    with pytest.raises(Stopped):
        stage(tmp_path, "a/b", KEY, Making(stop=Stopped()))
    assert not (folder / DONE).exists()


def test_a_result_that_json_cannot_hold_is_no_result(tmp_path):
    with pytest.raises(TypeError):
        stage(tmp_path, "a/b", KEY, Making({1, 2}))
    assert not (tmp_path / "a" / "b" / DONE).exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "the only copy"},
        {"thesis.txt": "the only copy", BEGUN: "on Monday"},
        {"thesis.txt": "the only copy", DONE: '{"stage": 3}'},
        {"thesis.txt": "the only copy", DONE: "[]", BEGUN: ""},
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_left_as_it_is(tmp_path, files, fresh):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    before = contents(tmp_path)
    make = Making(1)
    with pytest.raises(StageError, match=r"b is in the way: it was not made by the demonstration and is left"):
        stage(tmp_path, "a/b", KEY, make, fresh=fresh)
    assert (contents(tmp_path), make.found) == (before, [])


def test_bytes_that_are_no_text_are_foreign(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / BEGUN).write_bytes(b"\xff\xfe")
    with pytest.raises(StageError, match="in the way"):
        stage(tmp_path, "a/b", KEY, Making(1))


def test_an_empty_folder_is_nobodys(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert stage(tmp_path, "a/b", KEY, Making(1)).result == 1


def test_a_file_in_the_way_is_left_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("mine")
    with pytest.raises(StageError, match="in the way"):
        stage(tmp_path, "a/b", KEY, Making(1))
    assert (tmp_path / "a" / "b").read_text() == "mine"


@pytest.mark.parametrize("target", ["foreign", "stage", "empty", "absent", "file"])
@pytest.mark.parametrize("link", ["a/b", "a"])
@pytest.mark.parametrize("fresh", [False, True])
def test_nothing_is_removed_through_a_link(tmp_path, target, link, fresh):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    behind = elsewhere if link == "a/b" else elsewhere / "b"
    if target == "stage":
        stage(tmp_path, str(behind.relative_to(tmp_path)), {"recipe": 9}, Making(1))
    elif target == "file":
        elsewhere.write_text("mine")
    elif target != "absent":
        behind.mkdir(parents=True)
        if target == "foreign":
            (behind / "thesis.txt").write_text("the only copy")
    (out / link).parent.mkdir(exist_ok=True)
    (out / link).symlink_to(elsewhere)
    before = contents(tmp_path)
    make = Making(1)
    with pytest.raises(StageError, match="is in the way: it is a link"):
        stage(out, "a/b", KEY, make, fresh=fresh)
    assert (contents(tmp_path), make.found) == (before, [])
    assert (out / link).is_symlink()


def test_the_whole_may_lie_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    stage(tmp_path / "out", "a/b", KEY, Making(1))
    assert stage(tmp_path / "out", "a/b", {"recipe": 2}, Making(2)).result == 2
    assert (tmp_path / "disk" / "a" / "b" / DONE).is_file()


def test_a_link_in_a_stage_goes_and_its_target_stays(tmp_path):
    folder = stage(tmp_path, "a/b", KEY, Making(1)).folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    (folder / "link").symlink_to(tmp_path / "mine")
    stage(tmp_path, "a/b", KEY, Making(2), fresh=True)
    assert not (folder / "link").exists()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("number", range(5))
def test_stopped_while_clearing_it_stays_ours(tmp_path, monkeypatch, number):
    stage(tmp_path, "a/b", KEY, Making(1))
    calls = []

    def stopping(real):
        def call(*arguments, **options):
            calls.append(arguments)
            if len(calls) == number + 1:
                raise Stopped
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(stages.shutil, "rmtree", stopping(stages.shutil.rmtree))
        patched.setattr(Path, "unlink", stopping(Path.unlink))
        patched.setattr(Path, "rmdir", stopping(Path.rmdir))
        stage(tmp_path, "a/b", {"recipe": 2}, Making(2))
    other = Making(3)
    done = stage(tmp_path, "a/b", {"recipe": 2}, other)
    assert (done.result, done.taken_up, other.found) == (3, False, [[]])


def test_the_hash_of_code_sees_text_names_and_deviations(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "deep" / "x.py").write_text("1")
    (tmp_path / "one" / "known.txt").write_text("a # b")
    (tmp_path / "two.py").write_text("2")
    seen = [stages.code("one"), stages.code("one", "two.py"), stages.code("two.py", "one"), stages.code("two.py")]
    (tmp_path / "one" / "picture.png").write_text("")
    assert stages.code("one") == seen[0]
    (tmp_path / "one" / "known.txt").write_text("a # c")
    seen.append(stages.code("one"))
    (tmp_path / "one" / "deep" / "x.py").rename(tmp_path / "one" / "deep" / "y.py")
    seen.append(stages.code("one"))
    assert len(set(seen)) == len(seen)


def test_versions_of_what_is_there_and_what_is_not():
    found = stages.versions("numpy", "no-such-package-at-all")
    assert found["no-such-package-at-all"] == ""
    assert found["numpy"].partition(".")[0].isdigit()
