"""Shows Hydra the conf/ of each plugin, after ours. Hydra takes such code from ``hydra_plugins`` alone."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from slm_pipeline.config import plugins


class PluginSearchPath(SearchPathPlugin):
    """Appends what `slm_pipeline.config.plugins` has in use; called for everything that is composed."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for plugin in plugins.in_use():
            if plugin.conf.is_dir():
                search_path.append(provider=plugin.name, path=f"file://{plugin.conf}")
