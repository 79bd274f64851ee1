"""Evaluation of models: likelihood and generative benchmarks, comparison, contamination.

Reading order:

1. `tasks.py`: the interfaces of a task and of a model, and what all tasks share
2. `scoring.py`: log-likelihoods of token sequences
3. `bits_per_byte.py`: the task that predicts plain text
4. `benchmarks.py`, `benchmark_prompts.py`, `multiple_choice.py`: C-Eval, CMMLU, MMLU, C3
5. `generative.py`, `quiz.py`, `math_word_problems.py`: tasks scored by the generated answer
6. `open_ended.py`, `degeneration.py`, `judge.py`, `comparison.py`: answers side by side
7. `own_answers.py`: preference pairs from a model's own answers
8. `runner.py`: run a task on a model, with results that survive an interruption
"""
