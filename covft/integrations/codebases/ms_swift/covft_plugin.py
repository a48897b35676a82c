"""What `--external_plugins` of ms-swift takes."""

from covft.integrations.codebases.ms_swift import register

CovftTuner = register()
