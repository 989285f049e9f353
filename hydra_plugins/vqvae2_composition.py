"""Plugin of Hydra for `dvc exp run`: imports the resolver that conf/config.yaml uses. Hydra looks for plugins here."""

import pipeline.compose  # noqa: F401
