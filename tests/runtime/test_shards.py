"""What a long scoring keeps on disk: whole, or made again."""

from types import SimpleNamespace

import numpy as np

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
