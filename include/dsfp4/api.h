// Marks what the library exports; everything else is hidden.
#pragma once

#define DSFP4_API __attribute__((visibility("default")))
