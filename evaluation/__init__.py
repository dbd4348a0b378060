"""Evaluation of models: suites of tasks, protocols, metrics, baselines."""
