"""The parts of `benchmarks.bench_serving`: what is sent, to whom, how it is counted, and how it is shown."""
