"""Generates answers: batches of questions, shared visual features, the ledger of answers, the lmms-eval adapter."""
