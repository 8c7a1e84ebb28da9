"""What a compiled TPU program moves, counted in a text small enough to count by hand."""

from benchmarks.aot.traffic import hbm_traffic, kernel_bytes

PROGRAM = """
ENTRY %main {
  %keys = bf16[64,128]{1,0} parameter(0)
  %gather_fusion = s32[8]{0:T(128)S(1)} parameter(1)
  %bitcast.1 = bf16[64,128]{1,0} bitcast(%keys)
  %bitcast.2 = bf16[8,8,128]{2,1,0} bitcast(%bitcast.1)
  %attend.1 = bf16[8,128]{1,0} custom-call(%gather_fusion, %bitcast.1, %bitcast.2), custom_call_target="tpu_custom_call"
  %fusion.3 = bf16[32,128]{1,0} fusion(%keys, %gather_fusion), kind=kLoop, metadata={op_name="jit(step)/gather"}
  ROOT %fusion.4 = bf16[32,128]{1,0} fusion(%fusion.3), kind=kLoop, metadata={op_name="jit(step)/add"}
}
"""


def test_a_kernel_reads_a_paged_cache_once_and_is_no_gather_whatever_its_operands_are_called():
    cache, out = 64 * 128 * 2, 8 * 128 * 2
    assert hbm_traffic(PROGRAM)["attend"] == cache + out
    assert kernel_bytes(PROGRAM) == cache + 8 * 4 + out


def test_gathers_count_what_they_pick_and_the_rest_what_it_reads_and_writes():
    picked = 32 * 128 * 2
    assert hbm_traffic(PROGRAM)["gather and scatter"] == 2 * picked
    assert hbm_traffic(PROGRAM)["fusion"] == 2 * picked
