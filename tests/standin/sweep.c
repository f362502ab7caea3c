/* Looks once at everything, so that memory of the dead is given back and hazards are written down. */
#include "world.h"

#include <stdio.h>

int main(void)
{
    struct config config;
    struct usage usage;
    if (!world_config(&config))
        return 1;
    int lock = world_lock();
    world_usage(&config, &usage);
    world_unlock(lock);
    for (int gpu = 0; gpu < config.gpus; gpu++)
        printf("%s %lu\n", config.gpu[gpu].uuid, (unsigned long)usage.used[gpu]);
    return 0;
}
