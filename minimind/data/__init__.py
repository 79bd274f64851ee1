"""Data: files to records, records to token stores, token stores to training batches.

Reading order:

1. schemas      record layouts of published datasets, one `Record` class
2. read         files to a stream of records (input_files, compression, formats, invalid)
3. encode       records to token ids and loss masks
4. store        token stores on disk, built once for the same input (store_writer, store_manifest)
5. order        data order: a pure function of seed and position
6. packing      documents to sequences, `MixedDataset`: what training reads
7. prepare      raw text to filtered, deduplicated shards, before training
8. textbook     a synthetic corpus with questions and answers, for the demo and for tests

Also here: `stats` computes statistics, `ngrams` finds benchmark questions, `estimate` counts tokens
from a sample.

Published data: `registry` has the facts of datasets by name, `hub` speaks to Hugging Face and
ModelScope, `download` resumes and verifies, `hub_models` downloads model directories.
"""
