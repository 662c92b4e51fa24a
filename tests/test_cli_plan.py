import dataclasses
import re
from types import SimpleNamespace

import pytest
from test_cli import command, write_classes

from metagen_jax import build, plan
from metagen_jax.config import ChoiceConfig, DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.cost import Flops, Memory

SIZE, HIDDEN, LATENTS, CONTEXT = 28, 64, 2, 2
TINY = [
    *("--size", SIZE, "--shots", 2, 2, "--query", 3, "--network.hidden", HIDDEN, "--network.latents", LATENTS),
    *("--network.context", CONTEXT, "--inner.steps", 1, "--outer.warm-start", 0, "--outer.steps", 60),
]
MB = 1e6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("plan") / "data", num_classes=10, num_images=6)


@pytest.fixture(scope="module")
def config(folder):
    return check(
        TrainConfig(
            learner="reptile",
            data=DataConfig(str(folder), size=SIZE),
            network=ModelConfig(hidden=(HIDDEN,), latents=LATENTS, context=CONTEXT),
            inner=InnerConfig(steps=1),
            outer=OuterConfig(steps=60, tasks=8, warm_start=0),
            shots=(2, 2),
            query=3,
        )
    )


@pytest.fixture(scope="module")
def training(config):
    return build.training(config)


@pytest.fixture(scope="module")
def planned(folder, tmp_path_factory):
    """Return what the command printed, its exit code, the lines that it found, and what it left on disk."""
    kept, lines = [], []

    def spy(*arguments, real=plan.batching):
        lines.append(real(*arguments))
        return lines[-1]

    patch, place = pytest.MonkeyPatch(), tmp_path_factory.mktemp("empty")
    with patch.context() as context:
        context.chdir(place)
        context.setattr("metagen_jax.cli._keep_programs", lambda: kept.append("programs"))
        context.setattr(plan, "batching", spy)
        result = command(
            "plan", "reptile", "vae", "--data", folder, *TINY, "--outer.tasks", 8, "--memory-gb", 1, "--time"
        )
    assert result.code == 0, result.err
    return SimpleNamespace(out=result.out, configured=lines[0], alone=lines[1], left=[*kept, *place.iterdir()])


def test_parameters_of_every_player_are_those_counted_by_hand_and_their_roles_those_of_the_inner_loop(config, training):
    pixels, codes = SIZE * SIZE, 2 * LATENTS
    modulation = 2 * (HIDDEN + HIDDEN)  # a gain and a bias for each hidden unit of either network
    prior = LATENTS * LATENTS + 2 * LATENTS
    sizes = {
        "encoder": pixels * HIDDEN + HIDDEN * codes + codes,
        "decoder": LATENTS * HIDDEN,
        "head": HIDDEN * pixels + pixels,
        "modulation": modulation,
        "maps": CONTEXT * (modulation + pixels + codes),  # to every gain and every bias
        "prior": prior,
        "context": CONTEXT,
    }
    second_order = dataclasses.replace(config, learner="maml")
    found = plan.players(second_order, build.training(second_order))
    moves = {"prior": prior, "context": CONTEXT}
    want = {name: (size, "moves" if name in moves else "shared") for name, size in sizes.items()}
    want |= {f"{name}/log_rate": (size, "learned rate") for name, size in moves.items()}
    assert {name: (size, role) for name, size, role in found} == want
    assert {player.name for player in plan.players(config, training) if player.role == "moves"} == set(sizes)


@pytest.mark.parametrize(
    ("learner", "change", "moves"),
    [
        ("reptile", {}, {"encoder", "decoder", "head", "modulation", "maps", "prior", "context"}),
        ("anil", {}, {"prior"}),
        ("maml", {"moves": ("head",)}, {"head"}),
        ("joint", {}, set()),
        ("maml", {"steps": 0}, set()),
    ],
)
def test_only_what_the_inner_loop_moves_is_counted_as_a_tasks_own(config, learner, change, moves):
    changed = dataclasses.replace(config, learner=learner, inner=dataclasses.replace(config.inner, **change))
    found = plan.players(changed, build.training(changed))
    assert {player.name for player in found if player.role == "moves"} == moves


def test_a_condition_that_is_read_off_the_support_is_a_tasks_own(config):
    inner = dataclasses.replace(config.inner, moves=("generator_context",))
    changed = check(dataclasses.replace(config, learner="amortised", model="gan", inner=inner))
    role = {player.name: player.role for player in plan.players(changed, build.training(changed))}
    assert role["generator_context"] == "read, then moves"
    assert role["discriminator_context"] == "read"
    assert role["generator_head"] == "shared"


def test_operations_are_linear_in_the_tasks_however_they_are_batched(config, training):
    def products(num_tasks, chunk):
        return plan.operations(plan.trace(plan.with_tasks(config, num_tasks, chunk), training)).products

    two, four, eight = products(2, "all"), products(4, "all"), products(8, "all")
    assert eight - four == 2 * (four - two)
    assert products(4, 1) == pytest.approx(four, rel=0.05)  # their sum is made in another way
    image = 2 * (SIZE * SIZE * HIDDEN + HIDDEN * 2 * LATENTS + LATENTS * HIDDEN + HIDDEN * SIZE * SIZE)
    support = 2 * image
    assert 2 * support < four // 4 < 4 * support  # forward and backward


def test_memory_at_a_number_of_tasks_that_was_not_compiled_is_that_of_its_program(config, training, planned):
    actual = plan.compiled_memory(config, training, 700, "all")
    assert planned.configured.chunk == plan.chunk_of(config, training) == "all"
    assert planned.configured.temporary(700) == pytest.approx(actual.temporary, rel=0.05)
    assert planned.configured.total(700) == pytest.approx(actual.total, rel=0.05)
    assert planned.alone.per_task < 0.5 * planned.configured.per_task


def test_a_configured_chunk_is_kept_and_one_of_all_tasks_is_all(config, training):
    chunks = [dataclasses.replace(config.outer, task_chunk=chunk) for chunk in (1, 4, 8)]
    found = [plan.chunk_of(dataclasses.replace(config, outer=outer), training) for outer in chunks]
    assert found == [1, 4, "all"]


def test_the_largest_batch_grows_with_memory_fills_it_and_is_whole_chunks():
    line = plan.Batching("all", 10 * 10**6, 2 * MB, 0.5 * MB)
    limits = [MB * number for number in (1, 11.9, 12.4, 12.5, 13, 20, 100)]
    assert [line.largest(limit) for limit in limits] == [0, 0, 0, 1, 2, 16, 176]
    for limit in limits[3:]:
        largest = line.largest(limit)
        assert line.total(largest) <= limit < line.total(largest + 1)
    assert line._replace(chunk=10).largest(20 * MB) == 10
    assert line._replace(per_task=0.0).largest(20 * MB) is None


def test_the_chunk_that_is_advised_is_the_largest_whose_program_was_compiled_and_fits(config, training, monkeypatch):
    """12 tasks: 6 and 4 could fit by the chords, 6 turns out not to; 12 itself is what does not fit."""
    looked = []

    def compiled(config, training, num_tasks, chunk):
        looked.append(chunk)
        return Memory(int((1 + 0.5 * chunk) * MB), 0, 0, 0, 0)

    monkeypatch.setattr(plan, "compiled_memory", compiled)
    twelve = plan.with_tasks(config, 12, "all")
    configured, alone = plan.Batching("all", 0, 0.0, 0.5 * MB), plan.Batching(1, 0, MB, 0.0)
    assert plan.fitting_chunk(twelve, training, configured, alone, 3.8 * MB) == (4, 3_000_000)
    assert looked == [6, 4]
    assert plan.fitting_chunk(twelve, training, configured, alone, 0.9 * MB) is None
    assert plan.fitting_chunk(twelve, training, alone, alone, 3.8 * MB) is None
    assert looked == [6, 4]


def test_the_command_prints_parameters_operations_memory_and_time_and_writes_nothing(config, training, planned):
    assert planned.left == []
    found = plan.players(config, training)
    total = sum(player.num_parameters for player in found)
    own = sum(player.num_parameters for player in found if player.role == "moves")
    assert re.search(r"\| prior +\| 8 +\| moves +\|", planned.out)
    assert re.search(rf"\| all +\| {total:,} ", planned.out)
    assert own == total  # Reptile moves all
    assert f"of a task's own: {own:,} parameters; shared: 0; learned rates: 0" in planned.out
    count = plan.operations(plan.trace(config, training)).total
    assert float(re.search(r"operations: ([\d.]+) MFLOP a meta-step", planned.out)[1]) == pytest.approx(
        count / 1e6, 5e-3
    )
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in planned.out.splitlines() if row.startswith("|")}
    most = [int(rows[name][-1].replace(",", "")) for name in ("all at once", "one after the other")]
    assert 100 < most[0] < most[1]
    assert "outer.tasks=8 fits" in planned.out
    assert re.search(r"compiling: \d+ s", planned.out)
    assert re.search(r"a meta-step: [\d.]+ m?s, [\d.]+ [kMG]FLOP/s", planned.out)
    assert re.search(r"the whole run: [\d.]+ minutes \(60 meta-steps, compiling\)", planned.out)


def test_a_batch_that_does_not_fit_is_answered_with_what_would_and_is_not_run(folder, monkeypatch):
    memory = Memory(16 * 10**6, 2 * 10**6, 0, 0, 0)
    traced = SimpleNamespace(lower=lambda: SimpleNamespace(compile=lambda: None))
    monkeypatch.setattr(plan, "trace", lambda config, training: traced)
    monkeypatch.setattr(plan, "operations", lambda traced: Flops(3 * 10**9, 10**9, 1))
    monkeypatch.setattr("metagen_jax.cli.plan.bytes_at_peak", lambda compiled: memory)
    sizes = {"all": 1.0, 1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8}  # MB a task

    def compiled(config, training, num_tasks, chunk):
        return memory._replace(temporary=int(num_tasks * sizes[chunk] * MB))

    monkeypatch.setattr(plan, "compiled_memory", compiled)
    options = [*TINY, "--outer.tasks", 16, "--memory-gb", 0.01, "--time"]
    result = command("plan", "maml", "vae", "--data", folder, *options)
    assert result.code == 0, result.err
    assert (
        "outer.tasks=16 does not fit: it needs 18 MB of 9 MB; use --outer.task-chunk 4 (needs 8.4 MB), "
        "or --inner.inner-grad forward_over_reverse, or --inner.remat step, or fewer tasks, or a smaller network"
    ) in result.out
    assert re.search(r"all at once +\| 0 B +\| 1 MB +\| 16 MB +\| 18 MB +\| 7 ", result.out)
    assert "operations: 4 GFLOP a meta-step, 250 MFLOP a task, 75% of them in matrix products" in result.out
    assert "not timed" in result.out
    assert "the whole run" not in result.out


def test_only_settings_that_a_learner_reads_and_that_are_not_chosen_yet_are_advised(config):
    def advised(learner, **inner):
        changed = dataclasses.replace(config, learner=learner, inner=dataclasses.replace(config.inner, **inner))
        return plan.remedies(changed)

    assert advised("maml") == ["--inner.inner-grad forward_over_reverse", "--inner.remat step"]
    assert advised("anil", remat="step") == ["--inner.inner-grad forward_over_reverse"]
    assert advised("maml", steps=0) == advised("fomaml") == advised("reptile") == advised("joint") == []


def test_memory_there_is_that_of_the_machine_unless_it_is_given():
    there, where = plan.memory_there()
    assert 1e8 < there < 1e14
    assert where == "of this machine"
    assert plan.memory_there(2.5) == (2.5e9, "as given")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["malm", "vae"], r"unknown learner 'malm'; did you mean 'maml'\?"),
        (["maml", "vea"], r"unknown model 'vea'; did you mean 'vae'\?"),
        (["maml", "vae", "--data", "no/such/folder"], "no/such/folder is not there"),
        (["maml", "vae", "--data", "DATA", "--inner.moves", "encodr"], "inner.moves has encodr"),
        (["maml", "vae", "--data", "DATA", "--query", "10"], r"need 15 images in each class"),
        (["maml", "vae", "--outer.tasks", "0"], "outer.tasks must be at least 1"),
        (["maml", "vae", "--memory-gb", "-1"], "--memory-gb must be positive, got -1"),
        (["maml", "vae", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
        (["maml", "vae", "--out", "DATA"], "exists already"),
        (["maml", "vae", "--data", "DATA", *TINY, "--outer.task-chunk", "3"], "task_chunk=3 does not divide the 16"),
        (["maml", "vae", "--memory-gb", "many"], "memory-gb"),
        (["maml"], "MODEL"),
    ],
)
def test_plan_refuses_what_train_refuses_with_code_2_and_one_message(folder, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("plan", *(folder if argument == "DATA" else argument for argument in arguments))
    assert result.code == 2
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_settings_of_train_and_its_own():
    result = command("plan", "--help")
    assert result.code == 0
    for flag in ("--memory-gb", "--time", "--outer.task-chunk", "--network.hidden", "--shots", "LEARNER MODEL"):
        assert flag in result.out
    assert "plan" in command("--help").out


def test_more_tasks_have_as_many_candidates_each():
    config = TrainConfig(outer=OuterConfig(tasks=4), choice=ChoiceConfig("agreement", candidates=10))
    assert plan.with_tasks(config, 512, "all").choice.candidates == 3 * 512
    assert plan.with_tasks(config, 4, 2).choice.candidates >= 10
    assert plan.with_tasks(TrainConfig(), 512, "all").choice == ChoiceConfig()
