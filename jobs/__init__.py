"""The jobs: parse, build, run. The only readers and writers of tables."""
