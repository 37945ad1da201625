"""Every test process: CPU, eight forced devices, quick compilation, and a compilation cache kept between runs."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["ATTNX_TILES"] = ""  # sizes that a user has tuned are not what is tested
FLAGS = {"xla_force_host_platform_device_count": "8"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older emitter of fused loops compiles three to four times faster; later versions do not have it.
    FLAGS |= {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
for flag, setting in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={setting}"

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE = os.environ.get("ATTNX_TEST_CACHE", str(pathlib.Path(tempfile.gettempdir()) / "attnx-test-cache"))
"""Folder of the compilation cache; with an empty name there is none."""
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_traceback_in_locations_limit", 0)  # where operations come from costs a twentieth of compiling them
if CACHE:
    jax.config.update("jax_compilation_cache_dir", CACHE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


gc.set_threshold(100_000, 50, 100)  # tracing makes many objects that live: looking through them all the time takes a sixth of a run

MAPPINGS = 8_000
"""Memory mappings after which a process forgets what it compiled: every executable holds a few, and Linux allows 65530."""


LONG = "test_contracts.py", "test_doctests.py", "test_colab.py"


def pytest_collection_modifyitems(items):
    """The files that take long come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Compiled functions are dropped before the system runs out of mappings, which XLA answers with a segmentation fault."""
    yield
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as file:
            count = sum(1 for _ in file)
    except OSError:  # no such file but on Linux
        return
    if count > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """float64 for the test's duration."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised():
    """The compiler's optimisations, for tests of compiled bytes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
