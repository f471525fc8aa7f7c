import logging

from rich.console import Console

from jobs import progress
from lake.progress import read_progress, write_progress
from tests.fakes import record


def test_progress_is_told_through_a_file_that_is_replaced_whole(tmp_path):
    assert read_progress(tmp_path) is None
    write_progress(tmp_path, done=3, total=10, note="loss 0.5")
    assert read_progress(tmp_path) == (3, 10, "loss 0.5")
    (tmp_path / "progress.json").write_text("{")
    assert read_progress(tmp_path) is None


def test_a_log_gets_plain_lines(capsys, tmp_path):
    with progress.LogProgress() as shown:
        shown.skipped("1/2 ingest", record(rows=1234))
        shown.started("2/2 mine", str(tmp_path))
        shown.ended("2/2 mine", record(rows=7, seconds=1.25))
    assert capsys.readouterr().err.splitlines() == [
        "1/2 ingest: current (1,234 rows)",
        "2/2 mine ...",
        "2/2 mine: 7 rows in 1.2 s",
    ]


def test_a_terminal_shows_bars_and_gives_the_log_back(tmp_path):
    before = list(logging.getLogger().handlers)
    shown = progress.TerminalProgress()
    with (tmp_path / "screen").open("w") as screen:
        shown._bars.live.console = console = Console(record=True, force_terminal=True, width=120, file=screen)
        with shown:
            shown.started("1/1 train", str(tmp_path))
            logging.getLogger("x").warning("one worker died")
            shown.show(2, 4, "loss 0.5")
            shown.ended("1/1 train", record(rows=7))
    assert logging.getLogger().handlers == before
    assert "7 rows" in console.export_text()
