"""Every test runs with several CPU devices, rank promotion and key reuse as errors, and 32-bit floats."""

import gc
import os
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Small programs, each run a few times: compiling them well would take longer than running them badly.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if metadata.version("jaxlib").startswith("0.10."):  # flags come and go, and an unknown one ends the process
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # which takes less than half the time again
    FAST_COMPILE += " --xla_cpu_parallel_codegen_split_count=1"  # as every core has a test of its own
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}"

import chex
import jax
import pytest

gc.set_threshold(
    20_000, 20, 100
)  # most of what tracing makes is kept, and looking through it takes a twelfth of the time

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


@pytest.fixture(autouse=True, scope="session")
def _commands_use_one_device():
    """Let commands use one device unless they are given more, since programs for several take longer to compile."""
    from metagen_jax.sharding import task_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "metagen_jax.cli.train.task_mesh", lambda tasks, count=None: task_mesh(tasks, 1 if count is None else count)
        )
        yield


@pytest.fixture
def x64():
    """Run a test in 64-bit floats, for finite differences."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data():
    """Return the folder of real data, or skip."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("METAGEN_SHARED_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            "no real data here: set METAGEN_SHARED_DATA to the folder that has omniglot_gmn, omniglot and mnist"
        )
    return folder
