import io
import time

import numpy as np
import pytest
from PIL import Image

from metagen_jax import report
from metagen_jax.progress import Progress
from metagen_jax.report import Column, Line


def pixels_of(figure, tmp_path):
    return np.asarray(Image.open(report.save(figure, tmp_path / "f" / "figure.png")).convert("L"), np.float32) / 255


def test_grid_shows_ink_dark_where_the_images_have_it(tmp_path):
    support, samples = np.zeros((2, 8, 8, 1)), np.ones((9, 8, 8, 1))
    picture = pixels_of(report.support_and_samples(support, samples), tmp_path)
    left, right = picture[:, : picture.shape[1] // 4], picture[:, -picture.shape[1] // 2 :]
    assert (left < 0.2).mean() < 0.02 < 0.2 < (right < 0.2).mean()
    assert [entry.name for entry in (tmp_path / "f").iterdir()] == ["figure.png"]


def test_strip_has_every_column_and_refuses_columns_of_different_tasks(tmp_path):
    black = Column("before", np.ones((3, 4, 8, 8, 1)))
    figure = report.adaptation_strip([black, Column("after", np.zeros((3, 4, 8, 8, 1)))])
    assert [axis.get_title() for axis in figure.axes] == ["before", "after"]
    assert all(axis.images[0].get_array().shape == (30, 40) for axis in figure.axes)
    picture = pixels_of(figure, tmp_path)
    half = picture.shape[1] // 2
    assert (picture[:, :half] < 0.2).mean() > 0.3 > 0.02 > (picture[:, half:] < 0.2).mean()
    with pytest.raises(ValueError, match=r"same number of tasks in every column, got \[2, 3\]"):
        report.adaptation_strip([black, Column("after", np.zeros((2, 4, 8, 8, 1)))])


def test_colour_images_keep_their_colours():
    red = np.zeros((1, 8, 8, 3))
    red[..., 0] = 1
    figure = report.support_and_samples(red, red)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array()[4, 4], [1, 0, 0])


def test_adaptation_curve_draws_every_system_and_says_what_is_out_of_sight(tmp_path):
    run = Line("maml", [0, 1, 2], [-100, -95, -93], [-101, -96, -94], [-99, -94, -92])
    copy = Line("copy", [0], [-120.0], [-121.0], [-119.0])
    wild = Line("scratch", [0, 1, 2], [-500.0, -9000.0, None], [-501.0, -9001.0, None], [-499.0, -8999.0, None])
    gain = Line("maml", [0, 1, 2], [0, 5, 7], [0, 4, 6], [0, 6, 8])
    figure = report.adaptation_curve([run, copy, wild], [gain], 1, reference="maml at step 0")
    left, right = figure.axes
    curves = {line.get_label(): line for line in left.lines}
    np.testing.assert_array_equal(curves["maml"].get_ydata(), [-100, -95, -93])
    np.testing.assert_array_equal(curves["copy"].get_xdata(), [0, 2])
    assert left.get_title() == "in part or whole below: copy, scratch"
    assert left.get_ylim()[0] > -110
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [0, 5, 7])
    report.save(figure, tmp_path / "curve.png")


def test_adaptation_curve_of_a_run_that_diverges_everywhere_is_still_drawn(tmp_path):
    lost = Line("maml", [0, 1], [None, None], [None, None], [None, None])
    copy = Line("copy", [0], [-120.0], [-121.0], [-119.0])
    figure = report.adaptation_curve([lost, copy], [lost], 1, reference="maml at step 0")
    assert report.save(figure, tmp_path / "curve.png").exists()


def test_learning_curve_joins_warm_start_and_meta_training_and_skips_nulls():
    records = [{"phase": "warm start", "step": step, "loss": 200.0 - step} for step in (10, 20)]
    records += [{"phase": "meta", "step": step, "loss": None if step == 5 else 150.0} for step in (5, 10, 15)]
    figure = report.learning_curve(records)
    curves = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(curves["query, after adapting"].get_xdata(), [25, 30, 35])
    np.testing.assert_array_equal(curves["query, after adapting"].get_ydata(), [np.nan, 150, 150])
    np.testing.assert_array_equal(curves["joint warm start"].get_ydata(), [190, 180])
    assert report.learning_curve([]).axes


def test_progress_without_a_terminal_has_lines_and_no_control_characters():
    out = io.StringIO()
    with Progress("training", 30, unit="meta-step", tasks=4, file=out) as progress:
        for done in (10, 20, 30):
            time.sleep(0.01)
            progress.update(done, loss=100.0)
    lines = out.getvalue().split("\n")
    assert lines[0] == "training: compiling ..."
    assert lines[1].startswith("training: compiled, with the first 10 meta-steps, in ")
    assert lines[-2].startswith("training: 30/30 meta-steps, ")
    assert "tasks/s" in lines[-2]
    assert "\r" not in out.getvalue()
    assert "\033" not in out.getvalue()


def test_progress_on_a_terminal_counts_seconds_while_compiling_and_then_steps():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress("training", 20, unit="meta-step", tasks=4, file=out) as progress:
        time.sleep(0.5)
        progress.update(10, loss=100.0)
        time.sleep(0.02)
        progress.update(20, loss=90.0)
    shown = out.getvalue()
    assert "compiling ... 0 s" in shown
    assert shown.index("compiling") < shown.index("20/20")
    assert "tasks/s" in shown
    assert "loss 90.00" in shown
    assert progress.compile_seconds > 0.4
