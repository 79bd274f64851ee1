"""Files to records, records to token stores, stores to training windows."""
