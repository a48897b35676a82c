"""The file for ms-swift's `--external_plugins`."""

from covft.integrations.codebases.ms_swift import register

TUNERS = register()
