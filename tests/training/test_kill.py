"""``kill -9`` at random moments; ``kill.py`` does it as often as you like."""

import kill


def test_killed_runs_resume_bit_for_bit(tmp_path):
    assert len(kill.kill_and_resume(tmp_path, kills=3)) == 3
