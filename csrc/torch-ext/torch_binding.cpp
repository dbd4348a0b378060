// Makes the library a module that Python can import; registration.h is written by the builder. The operators themselves
// are registered where they are defined.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
