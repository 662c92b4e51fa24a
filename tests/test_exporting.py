"""An exported sampler makes the images of the model, also where this package is not, and a damaged one is refused."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax import build
from metagen_jax.config import ConditionalConfig, ModelConfig, TrainConfig, check
from metagen_jax.exporting import export_sampler, load_sampler

NUM = 3


def made(model, **network):
    """Return a model, and parameters that were moved a little from where they begin."""
    config = check(TrainConfig(learner="maml", model=model, network=ModelConfig(hidden=(8,), **network)))
    built = build.model(config, (8, 8, 1), True)
    params = jax.jit(built.model.init)(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return built.model, jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), params)


@pytest.fixture(scope="module")
def vae():
    return made("vae", latents=2, context=2)


@pytest.fixture(scope="module")
def content(vae):
    return export_sampler(vae[0].sample, vae[1], NUM)


def drawn(model, params, seed, num=NUM):
    return np.asarray(jax.jit(model.sample, static_argnums=2)(params, jax.random.key(seed), num))


def assert_same(found, expected):
    """Assert equal bits; later versions of jax compile the exported program to another last bit."""
    if jax.__version_info__ < (0, 11):
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_file_alone_makes_the_images_of_the_model_in_a_process_without_this_package(vae, content, tmp_path):
    path = tmp_path / "vae.jaxexport"
    path.write_bytes(content)
    code = (
        "import sys, jax, numpy as np\n"
        "from jax import export\n"
        "program = export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "assert program.platforms == ('cpu', 'cuda', 'tpu'), program.platforms\n"
        "images = program.call(jax.random.key_data(jax.random.key(7)))\n"
        "np.save(sys.argv[2], np.asarray(images))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('metagen_jax', 'flax', 'optax')]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "x.npy")], check=True, cwd=tmp_path)
    images = np.load(tmp_path / "x.npy")
    assert (images.shape, images.dtype) == ((NUM, 8, 8, 1), np.float32)
    assert_same(images, drawn(*vae, 7))


@pytest.mark.parametrize("model", ["vae", "gan", "autoregressive"])
def test_a_loaded_sampler_is_sample_for_the_key_of_the_seed(model, tmp_path):
    model, params = autoregressive() if model == "autoregressive" else made(model, latents=2)
    path = tmp_path / "a.jaxexport"
    path.write_bytes(export_sampler(model.sample, params, NUM))
    sampler = load_sampler(str(path))
    for seed in (0, 2**31 + 5):
        assert_same(sampler(seed), drawn(model, params, seed))
    assert not np.array_equal(sampler(0), sampler(1))


def autoregressive():
    small = ConditionalConfig(features=4, dilations=(1,))
    config = check(TrainConfig(learner="maml", model="autoregressive", conditional=small))
    model = build.model(config, (6, 6, 1), True).model
    return model, jax.jit(model.init)(jax.random.key(0))


def test_parameters_are_constants_and_what_sample_does_not_read_is_left_out(vae, content):
    model, params = vae
    large = params | {"unread": jnp.zeros(10**6)}
    assert abs(len(export_sampler(model.sample, large, NUM)) - len(content)) < 1000
    assert len(content) < 40_000
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert not np.array_equal(load_sampler(export_sampler(model.sample, other, NUM))(0), load_sampler(content)(0))


def test_the_same_parameters_make_the_same_file_which_names_no_path_of_this_machine(vae, content):
    before = jax.config.values["jax_traceback_in_locations_limit"]
    assert export_sampler(vae[0].sample, vae[1], NUM) == content
    assert jax.config.values["jax_traceback_in_locations_limit"] == before > 0
    assert b".py" not in content


def test_a_file_that_is_missing_damaged_or_cut_short_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_sampler(tmp_path / "none.jaxexport")
    path = tmp_path / "a.jaxexport"
    for length in (0, 1, 31, 48, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.jaxexport is not an exported sampler, or is damaged"):
            load_sampler(path)
    for place in np.linspace(0, len(content) - 1, 40).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        with pytest.raises(ValueError, match="this is not an exported sampler, or is damaged"):
            load_sampler(bytes(damaged))
    with pytest.raises(ValueError, match="or is damaged"):
        load_sampler(content + b"\0")


def test_a_program_of_something_else_or_of_another_jax_is_refused(content):
    from jax import export

    def signed(program):
        import hashlib

        mark = b"metagen-sampler1"
        return program + mark + hashlib.sha256(program + mark).digest()

    assert signed(content[:-48]) == content
    squares = export.export(jax.jit(jnp.square))(jnp.zeros(3)).serialize()
    with pytest.raises(ValueError, match="a program of something else than a seed"):
        load_sampler(signed(bytes(squares)))
    with pytest.raises(ValueError, match=f"that {jax.__version__} does not read"):
        load_sampler(signed(b"\x04\0\0\0" * 8))


def test_what_cannot_be_exported_is_refused(vae):
    model, params = vae
    with pytest.raises(ValueError, match="at least one image"):
        export_sampler(model.sample, params, 0)
    with pytest.raises(ValueError, match=r"sample made \[2\], where 3 images"):
        export_sampler(lambda params, key, num: jax.random.normal(key, (2,)), params, NUM)


def test_without_the_library_the_command_that_installs_it_is_said(vae, content, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for call in (lambda: export_sampler(vae[0].sample, vae[1], NUM), lambda: load_sampler(content)):
        with pytest.raises(ImportError, match=r"pip install 'metagen-jax\[export\]'"):
            call()
