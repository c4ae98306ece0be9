#include "attack.h"

const struct attack exhaust_attacks[] = {{NULL, NULL}};
