// The host meaning of sm90.cuh: the same functions, on the SIMT machine.
#pragma once
