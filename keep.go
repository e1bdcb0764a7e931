package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/gomodule/redigo/redis"
)

// keepMost is how many places, or tokens, one command keeps: it takes Redis some two milliseconds.
const keepMost = 250

// keptPlace is a pod that a process stands in line for.
type keptPlace struct {
	token   string
	arrival int64 // its place: Unix microseconds
	length  int
	pod     podName
}

// kept is what became of the places in a line.
type kept struct {
	created        int64 // when Redis began to know the semaphore (its Unix seconds), to be told the next time
	inUse, waiters int
	served         []string       // those in line, also others', that a token is free for: they are to ask for it
	held           []string       // those that have their token already
	joined         map[string]int // those that were not in line, and their positions
}

// keep keeps the places of pods in the line of a semaphore, where they are put if they are not there, and takes those out whose tokens
// are gone. known is what created was before, or zero. With an error, some of it may be done.
func (s *semaphores) keep(ctx context.Context, id semaphoreID, known int64, gone []string, pods []keptPlace) (all kept, err error) {
	all = kept{created: known, joined: map[string]int{}}
	for len(gone)+len(pods) > 0 {
		leaving := gone[:min(len(gone), keepMost)]
		staying := pods[:min(len(pods), keepMost-len(leaving))]
		gone, pods = gone[len(leaving):], pods[len(staying):]
		args := append([]any{all.created, len(leaving)}, anySlice(leaving)...)
		for _, p := range staying {
			args = append(args, p.token, p.arrival, p.length, p.pod)
		}
		_, rest, err := s.run(ctx, keepScript, id, args...)
		if err != nil {
			return all, fmt.Errorf("keep the line of %s: %w", id, err)
		}
		var served, held []string
		var joined []any
		_, err = redis.Scan(rest, &all.created, &all.inUse, &all.waiters, &served, &held, &joined)
		for ; err == nil && len(joined) >= 2; joined = joined[2:] {
			var token string
			var position int
			_, err = redis.Scan(joined, &token, &position)
			all.joined[token] = position
		}
		if err != nil {
			return all, fmt.Errorf("keep the line of %s: unexpected answer of queue Redis %s: %w", id, s.address, err)
		}
		all.served, all.held = served, append(all.held, held...)
	}
	return all, nil
}

// hold keeps tokens in flight, and returns those that are not there, and are not put back.
func (s *semaphores) hold(ctx context.Context, id semaphoreID, tokens []string) (lost []string, err error) {
	for chunk := range slices.Chunk(tokens, keepMost) {
		_, rest, err := s.run(ctx, holdScript, id, anySlice(chunk)...)
		if err != nil {
			return lost, fmt.Errorf("hold tokens of %s: %w", id, err)
		}
		var some []string
		if _, err := redis.Scan(rest, &some); err != nil {
			return lost, fmt.Errorf("hold tokens of %s: unexpected answer of queue Redis %s: %w", id, s.address, err)
		}
		lost = append(lost, some...)
	}
	return lost, nil
}

func anySlice[T any](items []T) (all []any) {
	for _, i := range items {
		all = append(all, i)
	}
	return all
}
