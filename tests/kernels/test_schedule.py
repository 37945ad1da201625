"""The TPU kernels' schedules: how they are read, and that they do not grow."""

import importlib.util
import json
import pathlib
from importlib import metadata

import pytest

from experiments import tpu_schedule

GROWTH = 1.03

BUNDLES = """
     0   :  { %s1 = smov 0 } /* Start region 1 :: Start region 2 */
   0x1 LB: > { %v1 = vld } /* Start region 3 */
   0x2   : > { %v2 = vmatmul ;; %v3 = vst /*vst_source=*/%v1 }
   0x3   : >> { %v3 = vpop } /* End region 3 :: Start region 4 */
   0x4   : > { %v4 = vadd } /* End region 4 */
   0x5 PF:  { %p1 = sbr } /* End region 2 */
   0x6   :  { %v4 = vmatpush } /* End region 9 :: Start/End empty region 7 */
"""
USE = """== CAPACTIY:
MATMUL, MATPUSH, VALU, VLOAD:FILL, VSTORE:SPILL
    4     4     4     3     1
== UTILIZATION:
0 0 0 0 0
0 0 0 1 0
3 0 0 2 1
0 0 0 0 0
0 0 4 0 0
0 0 0 0 0
0 1 0 0 0
"""


def test_reads_the_innermost_regions_that_feed_the_matrix_unit():
    (piece,) = tpu_schedule.pieces(BUNDLES, USE)
    assert (piece["bundles"], piece["matrix"], piece["spills"]) == (3, 1, 4)
    assert piece["used"]["MATMUL"] == 3 and piece["share"]["MATMUL"] == 0.25


def test_bundles_do_not_grow():
    """Recorded with ``python -m experiments tpu_schedule --record tests/kernels/bundles.json``."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler (pip install libtpu) is not installed")
    version = metadata.version("libtpu")
    recorded = json.loads(pathlib.Path(__file__).with_name("bundles.json").read_text())
    if version not in recorded:
        pytest.skip(f"schedules depend on the compiler, and bundles.json has counts of libtpu {', '.join(recorded)}, not {version}")
    found = tpu_schedule.counts(tpu_schedule.measure("v5e", tpu_schedule.RECORDED))
    assert found.keys() == recorded[version].keys()
    assert {name: (n, recorded[version][name]) for name, n in found.items() if n > GROWTH * recorded[version][name]} == {}
