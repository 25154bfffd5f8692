"""Adapters as files, with right answers: for programs that read PEFT's layout and cannot be called from Python.

`folder` writes them, and `judging` holds what a program answered against them, as ``minilora golden`` does.
"""
