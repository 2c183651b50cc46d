"""What a long scoring keeps on disk: whole, or made again."""

from types import SimpleNamespace

import numpy as np
import pytest

from transencoder.errors import InputError
from transencoder.runtime.shards import Shards

ONE_PROCESS = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def test_a_bit_that_flips_anywhere_in_a_shard_is_not_used(tmp_path, capsys):
    shards, kept = Shards(tmp_path / "out", {}, 4, ONE_PROCESS), np.arange(8, dtype=np.float32).reshape(4, 2)
    shards.save("encoder-0", 0, kept)
    (path,) = shards.folder.glob("*.npz")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = shards.load("encoder-0", 0, 4)
        assert found is None or np.array_equal(found, kept), place
    assert "is damaged; scoring it again" in capsys.readouterr().err
    path.write_bytes(whole)
    np.testing.assert_array_equal(shards.load("encoder-0", 0, 4), kept)
    assert shards.load("encoder-0", 1, 4) is None
    shards.remove()


def test_shards_that_depend_on_other_things_are_deleted(tmp_path):
    for metadata, there in (({"read": "a"}, False), ({"read": "a"}, True), ({"read": "b"}, False)):
        shards = Shards(tmp_path / "out", metadata, 4, ONE_PROCESS)
        assert (shards.load("encoder-0", 0, 4) is not None) == there
        shards.save("encoder-0", 0, np.zeros(4, dtype=np.float32))
    shards.remove()


@pytest.mark.parametrize("lies_there", ["link", "dangling link", "file"])
def test_what_is_no_folder_of_shards_is_neither_followed_nor_deleted(tmp_path, lies_there):
    folder, elsewhere = tmp_path / ".out.parts", tmp_path / "elsewhere"
    if lies_there == "file":
        folder.touch()
    else:
        folder.symlink_to(elsewhere)
    if lies_there == "link":
        elsewhere.mkdir()
    with pytest.raises(InputError, match=r"\.out\.parts: not a folder, where one .* belongs; delete it"):
        Shards(tmp_path / "out", {}, 4, ONE_PROCESS)
    assert not elsewhere.exists() or not list(elsewhere.iterdir())
