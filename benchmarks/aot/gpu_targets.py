"""GPUs to compile for without having one (extra gpu-aot)."""

from __future__ import annotations

from jax.experimental import topologies

from specformer_jax.planning.chips import CHIPS

# A GpuTargetConfigProto in text form, with the numbers of the data sheets (`planning/chips.py` has the bandwidths).
_GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: {core} shared_memory_per_block_optin: {optin} threads_per_core_limit: 2048 core_count: {cores}
fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 memory_bandwidth: {bandwidth}
l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory} registers_per_core_limit: 65536
registers_per_block_limit: 65536 cuda_compute_capability {{ major: {major} minor: 0 }} driver_version: "12.8.0"
runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.8.0" }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }} device_description_str: "{name}" """
GPUS = {
    "A100": _GPU.format(
        core=167936, optin=166912, cores=108, fpus=64, l2=41943040, clock=1.41, major=8,
        name="NVIDIA A100-SXM4-80GB",
        bandwidth=int(CHIPS["A100"].bandwidth), memory=CHIPS["A100"].memory * 2**30,
    ),
    "H100": _GPU.format(
        core=233472, optin=232448, cores=132, fpus=128, l2=52428800, clock=1.98, major=9,
        name="NVIDIA H100 80GB HBM3",
        bandwidth=int(CHIPS["H100"].bandwidth), memory=CHIPS["H100"].memory * 2**30,
    ),
}  # fmt: skip

REFUSE_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


def gpu_devices(name: str, count: int = 1) -> list:
    """`count` devices of a GPU in `GPUS`, in one host."""
    return list(
        topologies.get_topology_desc(platform="cuda", target_config=GPUS[name], topology=f"1x1x{count}").devices
    )
