"""The revision that results name, and that asking for it writes nothing into the repository."""

import os
import subprocess

from training import environment


def test_the_revision_is_read_and_nothing_written(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.find_git_revision() is None

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "--message=first")
    os.utime(tmp_path / "file", (1, 1))  # else than the index says: git would like to correct it
    index = (tmp_path / ".git" / "index").read_bytes()
    assert environment.find_git_revision() == git("rev-parse", "HEAD")
    assert (tmp_path / ".git" / "index").read_bytes() == index

    (tmp_path / "new").touch()  # not tracked
    assert environment.find_git_revision() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert environment.find_git_revision() == git("rev-parse", "HEAD") + "-dirty"
