"""Judging another implementation's recorded run: trace, gates, replay stage by stage, verdict. See judge.py."""
