/*
 * Every function of the model calls __fentry__ first; a function whose return is probed returns to
 * return_trampoline.
 */
	.text
	.globl __fentry__
	.hidden __fentry__
	.type __fentry__, @function
__fentry__:
	cmpl $0, armed(%rip)
	je 1f
	/* %rsp is a multiple of 16 here. */
	sub $64, %rsp
	mov %rdi, 0(%rsp)
	mov %rsi, 8(%rsp)
	mov %rdx, 16(%rsp)
	mov %rcx, 24(%rsp)
	mov %r8, 32(%rsp)
	mov %r9, 40(%rsp)
	mov %rax, 48(%rsp)
	mov %r10, 56(%rsp)
	mov %rsp, %rdi
	mov 64(%rsp), %rsi
	lea 72(%rsp), %rdx
	call on_entry
	mov 0(%rsp), %rdi
	mov 8(%rsp), %rsi
	mov 16(%rsp), %rdx
	mov 24(%rsp), %rcx
	mov 32(%rsp), %r8
	mov 40(%rsp), %r9
	mov 48(%rsp), %rax
	mov 56(%rsp), %r10
	add $64, %rsp
1:	ret
	.size __fentry__, . - __fentry__

	.globl return_trampoline
	.hidden return_trampoline
	.type return_trampoline, @function
return_trampoline:
	sub $16, %rsp
	mov %rax, 0(%rsp)
	mov %rdx, 8(%rsp)
	mov %rax, %rdi
	call on_return
	mov %rax, %r11
	mov 0(%rsp), %rax
	mov 8(%rsp), %rdx
	add $16, %rsp
	jmp *%r11
	.size return_trampoline, . - return_trampoline

	.section .note.GNU-stack, "", @progbits
