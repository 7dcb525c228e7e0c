"""Workflows: training, evaluation, prediction, conversion and distillation as functions."""
