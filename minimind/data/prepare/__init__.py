"""Preparation of pretraining text: filters, duplicates, decontamination, tokenization.

Reading order:

1. settings                     thresholds, with reasons in `recipes/prepare/zh.toml`
2. normalize, filters           what happens to one document (characters: code points as arrays)
3. minhash, duplicates          keys of documents, and which of equal ones are kept
4. stages                       each stage as a function of files and settings (shards: the files)
5. engine, progress             a pool of processes, or a Ray cluster
6. space                        is there enough room on the disk?
7. workspace, pipeline, report  resumable output folder, the stages in order, the result

Input and output may be URLs: see `minimind.data.locations`.
"""
