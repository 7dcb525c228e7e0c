"""`python -m perf_vit`."""

from perf_vit.cli.main import run

if __name__ == "__main__":
    run()
