"""Entry points and evidence: the command line, study files, the models shipped, benchmarks."""
