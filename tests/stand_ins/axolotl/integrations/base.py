class BasePlugin:
    pass


class PluginManager:
    cfg = None

    @staticmethod
    def get_instance():
        return PluginManager
