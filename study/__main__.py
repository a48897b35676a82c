"""Run the study's command line: `python -m study`."""

from study.cli import main

main()
