// The binary interface: what the library exports, and how a program that was compiled before goes
// on with a library that was installed later.
//
// A program may be compiled against one dsfp4 and run with another: a wheel or a package is
// upgraded, the program is not. It must then work, or be refused with a sentence; it must never
// read or write beyond a struct that one side has larger than the other.
//  - DSFP4_ABI is the number of the interface. It is in the library's file name and SONAME
//    (libdsfp4.so.1), so a program finds no library of another number, and in the name of every
//    symbol (the inline namespace), so that a library put in another's place by force is refused
//    by the dynamic linker, and two may live in one process.
//  - Structs that grow carry their size, struct_bytes, as their first member. The header that a
//    program is compiled with sets it. The library reads and fills only the fields that the
//    program's struct has; the others have their defaults. Options of a newer header are refused
//    with ParameterError, as the library cannot know what they ask for.
// Why so: plain structs are pleasant in C++ (designated initializers, no builder, no setters that
// allocate), and adding a field is the one change that every release makes. With sizes that is no
// break; any other change to a type or function is one, and raises the number.
// Two shared libraries of one process, compiled with different headers, each need
// -fvisibility-inlines-hidden, or the linker gives both the constructors of one.
// A new field is the last of a struct that has struct_bytes, and alignas(std::size_t), so that
// it never lies in what was padding. Structs without struct_bytes do not change.
#pragma once

#define DSFP4_ABI 1
#define DSFP4_ABI_NAMESPACE abi1

#define DSFP4_API __attribute__((visibility("default")))
/// Of an inline function: compiled into each program or library that calls it, and never taken from
/// another one, which may know larger or smaller structs.
#define DSFP4_LOCAL __attribute__((visibility("hidden")))
