#include "attack.h"

const struct attack machine_attacks[] = {{NULL, NULL}};
