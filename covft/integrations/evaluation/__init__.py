"""Benchmarks of models with a context-aware tower, by the engines that people use.

benchmarks    the paper's twelve, and the sets of forgetting: their names in each engine, and what differs
scores        reads an engine's result files
paper         the paper's table, beside its own figures
forgetting    what tuning improved and what it forgot, of two result folders
lmms_eval     models for lmms-eval, found by its entry points
run_lmms      the command line of lmms-eval, and its result files
vlmevalkit    VLMEvalKit's run.py with a model of covft, `python -m covft.integrations.evaluation.vlmevalkit`
told          another text for the tower alone, in any engine
"""
