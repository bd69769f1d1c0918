"""Files on systems that are not Linux: no folder is opened to be synced, and no link is needed."""

import os

from fusedvlm import files


def test_windows_syncs_files_and_leaves_folders_alone(tmp_path, monkeypatch):
    """There os.open refuses a folder, and fsync a file that was opened for reading."""
    (tmp_path / "a").write_text("x")
    opened = []
    really = os.open

    def windows_open(path, flags):
        opened.append((os.path.basename(path), flags))
        if os.path.isdir(path) or flags == os.O_RDONLY:
            raise PermissionError(path)
        return really(path, flags)

    files.sync(tmp_path)
    files.sync(tmp_path / "a")
    monkeypatch.setattr(files.os, "open", windows_open)
    monkeypatch.setattr(files.os, "name", "nt")
    folder, file = str(tmp_path), str(tmp_path / "a")  # a Path made now would be a WindowsPath
    files.sync(folder)
    files.sync(file)
    assert opened == [("a", os.O_RDWR)]


def test_a_link_is_a_copy_where_links_are_refused(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.write_text("x")
    files.link_or_copy(source, tmp_path / "b")
    assert (tmp_path / "b").is_symlink()

    def refused(*names):
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(files.os, "symlink", refused)
    files.link_or_copy(source, tmp_path / "c")
    assert not (tmp_path / "c").is_symlink()
    assert (tmp_path / "c").read_text() == "x"
