"""The record behind the plane of accuracy against trained numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from miniature.peft import plane
from miniature.peft.plane import MIME, gain, kind

RUN = SimpleNamespace(slug="loldu")
START, FULL, MINE = [50.0, 60.0, 55.0], (1000, [90.0, 94.0, 92.0]), (10, [80.0, 84.0, 85.0])


def made(**changes):
    arguments = dict(start=START, full=FULL, methods={"LoLDU, r = 10": MINE}, own="LoLDU")
    return plane(RUN, "new digits", **(arguments | changes))


def test_the_record_is_kept_beside_the_table():
    bundle = made()._repr_mimebundle_()
    record = json.loads(json.dumps(bundle[MIME]))
    assert record["own"] == ["LoLDU"] and record["full"]["trained"] == 1000
    assert "LoLDU, r = 10" in bundle["text/html"] and "new digits" in bundle["text/html"]


def test_rows_start_with_the_untouched_model_and_end_with_full():
    rows = made().rows()
    assert [r["method"] for r in rows] == ["untouched", "LoLDU, r = 10", "full fine-tuning"]
    assert rows[1]["share of full (%)"] == 1.0
    assert rows[-1]["share of full's gain (%)"] == 100.0
    np.testing.assert_allclose(rows[1]["share of full's gain (%)"], 100 * 84 / 111)


def test_gain_is_the_same_for_losses_and_in_any_unit():
    record = made().record
    falling = {**record, "start": [-v for v in START], "full": {"scores": [-v for v in FULL[1]]}}
    share, half = gain(record, MINE[1])
    np.testing.assert_allclose(gain(falling, [-v for v in MINE[1]]), (share, half))
    assert 0 < half < 1


def test_interval_is_that_of_the_jackknife():
    record, up = made().record, np.array(MINE[1]) - START
    down = np.array(FULL[1]) - START
    left = np.array([np.delete(up, i).mean() / np.delete(down, i).mean() for i in range(3)])
    spread = np.sqrt(2 / 3 * ((left - left.mean()) ** 2).sum())
    np.testing.assert_allclose(gain(record, MINE[1])[1], 4.302652729911275 * spread)


def test_kind():
    assert kind("LoRA, r = 4") == "LoRA" and kind("full") == "full"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"full": (1000, [90.0])}, "has 1 scores, the start 3"),
        ({"methods": {"LoLDU": (0, MINE[1])}}, "trains 0 numbers"),
        ({"own": "LoRA"}, r"own names \['LoRA'\]; the methods: LoLDU, r = 10"),
        ({"own": []}, "own names nothing"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes)
