"""Do the daemon and a keeper that was there before it mean the same engines?"""

import hashlib
import json
from dataclasses import asdict

from swapserve.config.recipes import launch_argv, launch_env
from swapserve.config.schema import Config


def digest(config: Config) -> str:
    """Return a hash of all that the keeper does with a configuration.

    What only the daemon looks at (front door, scheduling, budgets) may change under a running
    keeper.
    """
    engines = {
        model.name: (
            launch_argv(model, host="", port=0),
            sorted(launch_env(model, host="", port=0).items()),
            (model.model, model.port, model.sandbox, model.stop_grace_s, model.recipe.name),
            (
                model.attach,
                model.container_image,
                model.recipe.container_args,
                model.recipe.shm_bytes,
            ),
        )
        for model in config.models.values()
    }
    parts = (asdict(config.paths), asdict(config.keeper), asdict(config.images), engines)
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()
